"""Files and directories that are written aside and then moved into place, and what a kill leaves of them.

A temporary of ``NAME`` is called ``.NAME.mobizo-PID-RANDOM``, stands beside it and is locked while its writer lives.
The next writer of ``NAME`` removes those without a writer. Nothing else is ever removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: A writer that has not locked its new temporary after so many seconds is gone, even if another has its number now.
_YOUNG_SECONDS = 60.0


@contextmanager
def temporary(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """A new, locked file (or directory) beside ``path``; removed at the end unless it was moved away.

    Raises:
        OSError: the file system refuses.
    """
    place = path.with_name(f".{path.name}.mobizo-{os.getpid()}-{secrets.token_hex(4)}")
    if directory:
        place.mkdir(mode=0o700)
    else:
        os.close(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # a file system without locks: leftovers then stay, which harms nobody
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield place
        finally:
            os.close(descriptor)
    finally:
        _remove(place)


def replace_with(path: Path, data: bytes) -> None:
    """Make ``path`` hold ``data``, on disk: at every moment it is the old file or the new one. Raises ``OSError``."""
    with temporary(path) as place:
        with place.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place.chmod(0o644)
        place.replace(path)


def remove_leftovers(path: Path) -> list[Path]:
    """Remove the temporaries of ``path`` whose writer is gone; gives their paths.

    What cannot be removed is left, and so is everything whose name we do not give.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.mobizo-(\d+)-[0-9a-f]{{8}}")
    removed: list[Path] = []
    try:
        names = [entry.name for entry in os.scandir(path.parent)]
    except OSError:
        # No such directory, or one that cannot be read: there is nothing that could be removed.
        return removed
    for name in names:
        match = pattern.fullmatch(name)
        place = path.with_name(name)
        if match and _abandoned(place, int(match.group(1))):
            _remove(place)
            removed.append(place)
    return removed


def _abandoned(place: Path, writer: int) -> bool:
    try:
        found = place.lstat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return False
        if _alive(writer) and time.time() - found.st_mtime < _YOUNG_SECONDS:
            # Perhaps made a moment ago, and not locked yet.
            return False
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
