"""Model cards: a checkpoint's README.md, filled from the facts of its run."""

from .write import CardError, write_model_card

__all__ = ["CardError", "write_model_card"]
