"""The one exception type of this room."""


class InferenceError(ValueError):
    """A checkpoint, cohort or codes file that inference cannot use; the text says what to do."""
