"""Files that are either whole or not there, and checkpoints of tensors and plain data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch

from .errors import InputError

FORMAT = "fusemlp.mlp 1"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write `path` so that a crash at any moment leaves the old file or the new one, and nothing else on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write tensors and plain data, atomically."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **contents}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote. Raises InputError naming a missing, damaged or foreign file."""
    try:
        with ZipFile(path) as archive:
            # torch.load does not look at the checksums that torch.save writes.
            if damaged := archive.testzip():
                raise BadZipFile(f"bad checksum of {damaged}")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"checkpoint {path} is damaged or no checkpoint: {reason}") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"checkpoint {path} was not written by this version of fusemlp.mlp ({FORMAT!r})")
    return contents
