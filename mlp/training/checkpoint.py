"""Atomic file writes, and checkpoints that contain only tensors and plain data."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch

from .errors import CannotWrite, InputError

FORMAT = "fusemlp.mlp 2"


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Write a file atomically: after a crash or an error, `path` holds either the old contents or the new ones.

    Args:
        path: File to create or replace. A temporary file is written in the same folder and then renamed.

    Yields:
        The temporary file, open for writing bytes. If the `with` block raises, the file is deleted and `path` is left
        unchanged.

    Raises:
        CannotWrite: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CannotWrite(f"{path} cannot be written: {error.strerror}") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Write the names of a folder's files to the disk. Windows does so by itself, and cannot open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: File to create or replace.
        contents: Tensors and plain data: numbers, strings, None, and lists, tuples and dicts of these.

    Raises:
        CannotWrite: The file cannot be written.
    """
    with atomic_write(path) as file:
        try:
            torch.save({"format": FORMAT, **contents}, file)
        except RuntimeError as error:  # of PyTorch's writer, which does not say what the system said
            raise CannotWrite(f"{path} cannot be written; is the disk full? ({error})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote.

    Args:
        path: The checkpoint file.

    Returns:
        The saved contents, with all tensors on the CPU, and the key "format".

    Raises:
        InputError: If the file is missing or damaged, or was not written by this version of the training command.
    """
    try:
        with ZipFile(path) as archive:
            # torch.load does not verify the checksums that torch.save writes.
            if damaged := archive.testzip():
                raise BadZipFile(f"bad checksum of {damaged}")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).partition("\n")[0]
        raise InputError(f"checkpoint {path} is damaged or not a checkpoint: {reason}") from None
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise InputError(f"checkpoint {path} was not written by this version of fusemlp.mlp ({FORMAT!r})")
    return contents
