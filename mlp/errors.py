"""Errors of arguments. Each is a RuntimeError too, since PyTorch raises that for a wrong shape, dtype or device."""


class ArgumentValueError(ValueError, RuntimeError):
    """An argument of a wrong shape or value, or on a wrong device."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of a wrong type or dtype."""
