"""The one exception type of this room."""


class EvaluationError(ValueError):
    """Something handed to the evaluation cannot be scored; the message says what and where."""
