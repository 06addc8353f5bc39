"""Errors that the training command reports in one line, without a traceback."""


class InputError(ValueError):
    """An option or input file is invalid. The message names the option, the value given and the values allowed."""


class Diverged(RuntimeError):
    """The loss became infinite or NaN. The message names the step and the layer where this began."""


class CannotWrite(RuntimeError):
    """A file cannot be written, for example because the disk is full. The message names the file and the reason."""


class Interrupted(RuntimeError):
    """The user interrupted a run. The message says how to continue it."""
