"""Training: `text`, `avq` and `lm`, each a script that reads from top to bottom and runs under `accelerate launch -m`."""

from .arguments import TrainingError

__all__ = ["TrainingError"]
