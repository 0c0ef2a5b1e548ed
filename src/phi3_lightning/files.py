"""The user's paths, and errors of the file system."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3_lightning.errors import ConfigError

__all__ = ["file_error", "local_path", "remedy", "writing"]

_ADDRESS = re.compile(r"[A-Za-z][\w+.:-]*:/")

_ROOM = "free some space there, or name a place on another disk"
_RIGHTS = "make it writable, or name another place"
_KIND = "move what is in the way, or name another place"
_NAME = "give another name"
_REMEDIES = {
    errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EFBIG: _ROOM,
    errno.EROFS: _RIGHTS, errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS,
    errno.ENOTDIR: _KIND, errno.EEXIST: _KIND, errno.EISDIR: _KIND, errno.ENOTEMPTY: _KIND,
    errno.ENOENT: "make its folder, or name another place",
    errno.ENAMETOOLONG: _NAME, errno.ELOOP: _NAME,
    errno.EIO: "the disk or the network fails: name a place on another disk",
    errno.ESTALE: "the network drive was mounted anew: start again, or name a place on another disk",
}  # fmt: skip

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors that only a file system raises; others are its errors if they name a file."""


def local_path(option: str, value: str | os.PathLike[str]) -> Path:
    """Return the path on this machine that an option names, with ``~`` for the home folder.

    Raises:
        ConfigError: If it is an address such as ``s3://bucket/folder``, which would become a folder named ``s3:``.
    """
    text = os.fspath(value)
    if _ADDRESS.match(text):
        local = re.sub("^file:/+(localhost/+)?", "/", text)
        remedy = "mount it or copy it, and give the local path" if local == text else f"give {local}"
        raise ConfigError(f"{option}: {text} is an address, and no path on this machine; {remedy}")
    return Path(os.path.expanduser(text))  # noqa: PTH111, which raises where there is no such home


def remedy(error: BaseException | None) -> str | None:
    """Return what to do about an error of the file system; None for any other."""
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return None
    return _REMEDIES[error.errno] if error.filename is not None or error.errno in _DISK_ERRORS else None


def file_error(error: OSError, place: Path | None = None) -> str | None:
    """Return in one line which file the system refuses, why, and what to do; None for an error of another kind.

    ``place`` is the folder that was being written, for an error that names no file.
    """
    what_to_do = remedy(error)
    if what_to_do is None:
        return None
    name = error.filename2 or error.filename or place
    return f"{'' if name is None else f'{name}: '}{os.strerror(error.errno or 0)}; {what_to_do}"


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn an error of the file system into one line, which names its file, or the place for a full disk.

    Raises:
        ConfigError: If nothing can be written there.
    """
    try:
        yield
    except Exception as error:
        system_error = _system_error(error)
        line = None if system_error is None else file_error(system_error, place)
        if line is None:
            raise
        raise ConfigError(line) from error


def _system_error(error: Exception) -> OSError | None:
    """The system's error behind a library's; libraries in Rust (safetensors, tokenizers) have it in the message."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    # torch's writer of zip files gives no reason itself
    return error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else None
