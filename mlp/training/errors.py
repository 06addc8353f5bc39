"""Errors that the training command reports in one line, without a traceback, and how they show what users gave."""

from collections.abc import Iterable
from reprlib import Repr
from typing import Any

MOST_LISTED = 20
_repr = Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """A name or a cell in quotes; of a long one the beginning and the end."""
    return _repr.repr(value)


def listed(names: Iterable[Any]) -> str:
    """The first names, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(shown(str(name)) for name in names[:MOST_LISTED]) + more


class InputError(ValueError):
    """An option or input file is invalid. The message names the option, the value given and the values allowed."""


class Diverged(RuntimeError):
    """The loss became infinite or NaN. The message names the step and the layer where this began."""


class CannotWrite(RuntimeError):
    """A file cannot be written, for example because the disk is full. The message names the file and the reason."""


class Interrupted(RuntimeError):
    """The user interrupted a run. The message says how to continue it."""
