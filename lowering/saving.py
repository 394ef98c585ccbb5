"""Puts a program's files into place, so that at every moment the old program is whole or the new one is.

Everything is written aside first. The manifest beside the program is only a copy and a program without it opens, so it
leaves before the program changes and comes back after. A weights file with other bytes than the one in place first gets
a name made from its hash, where the driver finds it too, until the program that needs it is in place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lowering.errors import OutputNotOurs
from runtime_driver.format import FORMAT, content_name

Write = Callable[[BinaryIO], object]

#: In the head of a .pte: root offset and identifier, then the extended header with the size of its flatbuffer.
_PROGRAM_HEAD = struct.Struct("<4x2s2s4sIQ")
#: In the head of a .ptd: identifier, then the header: magic, length, offset and size of its flatbuffer.
_WEIGHTS_HEAD = struct.Struct("<4x2s2s4sIQQ")
_MARK = b"mobizo_manifest"
#: The names of weights, made from their bytes.
_WEIGHT_NAME = re.compile(rb"[0-9a-f]{64}")
#: The end of the names that `tempfile` makes.
_RANDOM = r"[a-z0-9_]{8}"


def check_output(path: Path, weights: bool) -> None:
    """Check that `path` may be written, with its manifest and, if it has them outside, its weights beside it.

    Raises:
        OutputNotOurs: one of the names is taken by something that this package did not write.
        OSError: one of the names cannot be looked up.
    """
    if path.suffix in (".json", ".ptd"):
        raise OutputNotOurs(path, f"the ending {path.suffix} is that of a file beside the program")
    _check(path, _is_program, "is not a program of ours")
    _check(path.with_suffix(".json"), _is_manifest, "is not a manifest of ours")
    if weights:
        _check(path.with_suffix(".ptd"), _is_weights, "is not a weights file of ours")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write in, gone afterwards; with it what killed writers of `target` left.

    Writers hold a lock on their directory, so that one that is at work keeps it.

    Raises:
        OSError: the folder cannot be written to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(target)
    descriptor, place = _locked_directory(target)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(descriptor)


def save(
    target: Path, program: Write, manifest: Callable[[], bytes], weights: Write | None = None, weights_sha256: str = ""
) -> None:
    """Write the files and put them into place.

    Args:
        manifest: called once the program is written.
        weights: writes the weights file; None: there is none, or it exists already.
        weights_sha256: its hash, if there is one.

    Raises:
        OutputNotOurs: see `check_output`.
        OSError: a file cannot be written; what was there before is as it was.
    """
    check_output(target, weights is not None)
    with staging(target) as place:
        _write(place / "program", program)
        _write(place / "manifest", lambda file: file.write(manifest()))
        named = None
        if weights is not None and not _has_hash(target.with_suffix(".ptd"), weights_sha256):
            _write(place / "weights", weights)
            named = _place_weights(place / "weights", target.with_suffix(".ptd"), weights_sha256)
        sidecar, aside = target.with_suffix(".json"), place / "old manifest"
        if sidecar.exists():
            sidecar.replace(aside)
        try:
            (place / "program").replace(target)
        except OSError:
            if aside.exists():
                aside.replace(sidecar)
            if named is not None:
                named.unlink()
            raise
        (place / "manifest").replace(sidecar)
        if named is not None and named != target.with_suffix(".ptd"):
            named.replace(target.with_suffix(".ptd"))
        _remove_unneeded_weights(target)
    _sync(target.parent)


def _place_weights(written: Path, weights: Path, sha256: str) -> Path:
    """Where nothing is lost: under its own name if that is free, else under the one made from its hash."""
    place = weights.with_name(content_name(weights.name, sha256)) if weights.exists() else weights
    written.replace(place)
    return place


def _write(path: Path, write: Write) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What is ours


def _check(path: Path, ours: Callable[[BinaryIO], bool], problem: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    for is_kind, name in ((stat.S_ISDIR, "directory"), (stat.S_ISLNK, "symbolic link")):
        if is_kind(mode):
            raise OutputNotOurs(path, f"is a {name}")
    if not stat.S_ISREG(mode):
        raise OutputNotOurs(path, "is not a regular file")
    # An empty file, as tools for temporary files make them, has nothing to lose.
    if path.stat().st_size:
        with path.open("rb") as file:
            if not ours(file):
                raise OutputNotOurs(path, problem)


def _is_program(file: BinaryIO) -> bool:
    head = file.read(_PROGRAM_HEAD.size)
    if len(head) < _PROGRAM_HEAD.size:
        return False
    identifier, version, magic, _, size = _PROGRAM_HEAD.unpack(head)
    if identifier != b"ET" or not version.isdigit():
        return False
    return _MARK in file.read(size if magic == b"eh00" else -1)


def _is_manifest(file: BinaryIO) -> bool:
    try:
        data = json.load(file)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _is_weights(file: BinaryIO) -> bool:
    head = file.read(_WEIGHTS_HEAD.size)
    if len(head) < _WEIGHTS_HEAD.size:
        return False
    identifier, _, magic, _, offset, size = _WEIGHTS_HEAD.unpack(head)
    if identifier != b"FT" or magic != b"FH01":
        return False
    file.seek(offset)
    return _WEIGHT_NAME.search(file.read(size)) is not None


def _has_hash(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


# What killed writers leave


def _locked_directory(target: Path) -> tuple[int, Path]:
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".mobizo-{target.name}-", dir=target.parent))
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # A file system without locks: nobody can remove it for one that was left.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if place.is_dir():
            return descriptor, place
        os.close(descriptor)  # Removed by another writer before it was locked.


def _remove_left_behind(target: Path) -> None:
    name, stem = re.escape(target.name), target.stem
    ours = re.compile(rf"\.mobizo-{name}-{_RANDOM}")
    # Of version 0.1, which held no locks.
    former = re.compile(rf"\.mobizo-{_RANDOM}")
    part = re.compile(rf"\.{re.escape(stem)}\.(pte|json|ptd)\.{_RANDOM}\.part")
    files = {target.name, f"{stem}.json", f"{stem}.ptd", f"{stem}.tokenizer"}
    for entry in list(os.scandir(target.parent)):
        if entry.is_dir(follow_symlinks=False):
            whose = former.fullmatch(entry.name) and _holds_only(Path(entry.path), files, part)
            if ours.fullmatch(entry.name) or whose:
                _remove_unlocked(Path(entry.path))
        elif part.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
            Path(entry.path).unlink(missing_ok=True)


def _holds_only(directory: Path, names: set[str], part: re.Pattern[str]) -> bool:
    found = [entry.name for entry in directory.iterdir()]
    return bool(found) and all(name in names or part.fullmatch(name) for name in found)


def _remove_unlocked(directory: Path) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # Its writer is at work.
    else:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove_unneeded_weights(target: Path) -> None:
    """Weights that a killed writer had named by their hash, which proves that they are ours."""
    weights = target.with_suffix(".ptd")
    pattern = re.compile(rf"{re.escape(weights.stem)}\.([0-9a-f]{{16}})\.ptd")
    for entry in list(os.scandir(target.parent)):
        found = pattern.fullmatch(entry.name)
        if found and entry.is_file(follow_symlinks=False):
            with Path(entry.path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest.startswith(found[1]):
                Path(entry.path).unlink(missing_ok=True)
