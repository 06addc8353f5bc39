"""What the training command reports in one line."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the option, what was given and what is allowed."""


class Diverged(RuntimeError):
    """The loss is no longer finite; the message names the step and the layer."""
