"""The exception types of this room."""


class CardError(ValueError):
    """Facts that cannot be put on a card; the text names the fact."""


class PublishError(ValueError):
    """What cannot be published, or a Hub that cannot be reached; the text says what to do."""
