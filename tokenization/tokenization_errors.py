"""The one exception of this room."""


class TokenizationError(ValueError):
    """An input, a setting or an id that cannot be turned into model inputs without guessing.

    The message says what was expected, what was found, where, and what to do.
    """
