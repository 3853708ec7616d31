"""Errors for mistakes that a user can correct: each message says what, where, and what was expected."""


class StormError(ValueError):
    """Base of every error caused by what the user gave; the CLI prints it as one line and exits with 2."""


class VideoError(StormError):
    """A video, image or animation cannot be read as asked; the message names the source."""


class ModelError(StormError):
    """A model, checkpoint or part of one cannot be found, loaded or composed; the message names it."""


class BudgetError(StormError):
    """A request does not fit the context, the token budget or the memory; the message says what would."""


class DataError(StormError):
    """A data set, a mixture or one of its records cannot be read; the message names the file and the field."""


class RecipeError(StormError):
    """A training recipe has an unknown or unusable setting; the message names the file and the field."""
