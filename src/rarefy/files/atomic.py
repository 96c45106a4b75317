"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, or a file size that this process or file system does not allow."""

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class DiskFull(OSError):
    """A file did not fit; what was there before is untouched."""

    def __str__(self) -> str:
        return str(self.strerror)


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object] | bytes, *, size: int | None = None
) -> None:
    """Write a file so that at every moment, power cuts included, `path` is the old file or the whole new one.

    The bytes go to a temporary name in the same folder (`.NAME.RANDOM.tmp`, left behind only by a kill), reach the
    disk, and take the name in one step. A link is followed: the file that it names is replaced.

    Args:
        path: in a folder that exists.
        write: the content, or what writes it to a seekable binary file.
        size: bytes that `write` will need, if known, for the message when they do not fit.
    Raises:
        DiskFull: an OSError that names the file, the bytes needed and those free.
        OSError: the folder is missing or not writable.
        Exception: whatever `write` raises. In all cases the old file is untouched and the temporary one removed.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    if isinstance(write, bytes):
        size = len(write)
    try:
        # Not tempfile: its files are for the owner alone, and these should have the usual rights.
        with open(temporary, "xb") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_full(error, path, target.parent, size) from error
        raise
    _sync_folder(target.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete the temporary files that killed writers left in a folder to which no one writes at the moment."""
    for path in Path(folder).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _disk_full(error: OSError, path: str | os.PathLike[str], folder: Path, size: int | None) -> DiskFull:
    needed = f"{size:,} bytes are needed" if size is not None else "its bytes do not fit"
    free = shutil.disk_usage(folder).free
    why = "no file may grow so large here" if error.errno == errno.EFBIG else f"{free:,} are free in {folder}"
    return DiskFull(
        error.errno,
        f"{os.fspath(path)} cannot be written: {needed} and {why}; what was there before is untouched. "
        "Free some space or write elsewhere",
    )


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut. The file is whole by now, so that a refusal is no error."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
