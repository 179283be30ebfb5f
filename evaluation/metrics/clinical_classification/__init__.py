"""Balanced accuracy, accuracy of each class, and AUC over subjects, as an `evaluate` module."""
