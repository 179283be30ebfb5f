"""R2 of reconstructed region series, as an `evaluate` module."""
