"""Training: `text`, `avq` and `lm`.

Each is a script that reads from top to bottom and runs under `accelerate launch -m`.
"""

from .arguments import TrainingError

__all__ = ["TrainingError"]
