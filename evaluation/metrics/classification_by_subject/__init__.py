"""Balanced accuracy and AUC over subjects, as an `evaluate` module."""
