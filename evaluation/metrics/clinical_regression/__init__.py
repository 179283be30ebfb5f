"""MAE, Pearson r and R2 over subjects, as an `evaluate` module."""
