"""Can a classifier tell codes from text, as an `evaluate` module."""
