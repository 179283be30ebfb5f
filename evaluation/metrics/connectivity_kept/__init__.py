"""Connectivity before and after, as an `evaluate` module."""
