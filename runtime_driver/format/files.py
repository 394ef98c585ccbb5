"""Opens files whose names come from a user: regular files only, so that no pipe or device is waited for."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnusablePath(OSError):
    """A path that no file of ours can have: not a regular file, or a name that the system cannot hold."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(errno.EINVAL, problem, os.fspath(path))


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise :class:`UnusablePath` for a name with a NUL byte, or with characters that cannot be encoded."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UnusablePath(path, "the name cannot be encoded") from error
    if b"\0" in encoded:
        raise UnusablePath(path, "the name holds a NUL byte")


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """A descriptor of a regular file, or of a new one where ``flags`` has ``O_CREAT``.

    Raises:
        UnusablePath: a pipe, a socket, a device, or a name that the system cannot hold.
        OSError: any other failure; a directory is :class:`IsADirectoryError`.
    """
    check_path(path)
    # Before it is opened: opening a device can have effects, and opening a pipe waits for its other end.
    if Path(path).exists():
        _check_regular(path, os.stat(path).st_mode)  # noqa: PTH116
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """A regular file's bytes. Raises as :func:`open_regular`."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read()


def _check_regular(path: str | os.PathLike[str], mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    for matches, kind in _KINDS:
        if matches(mode):
            raise UnusablePath(path, f"{kind}, not a regular file")
