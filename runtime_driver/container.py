"""A look at a .pte file's bytes before the runtime sees them.

A .pte is a flatbuffer followed by segments (weights, delegate blobs). The runtime verifies the flatbuffer's structure;
what is in the segments it takes as it is. The footer holds a hash and covers all of it. The sizes in the extended
header tell whether the file is whole. A mapped file that is too short ends the process with SIGBUS at the first touch
of a missing page, so this is checked even where the footer is not.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from runtime_driver.errors import ProgramFileError
from runtime_driver.format.files import open_regular
from runtime_driver.format.footer import FileHash, FooterError, check_footer

#: Flatbuffer root offset and file identifier, then the extended header: magic, length, three 64-bit sizes.
_HEAD = struct.Struct("<I4s4sIQQ")
_SEGMENT_SIZE = struct.Struct("<Q")
_UINT, _INT, _USHORT = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<H")
#: Numbers of fields in ExecuTorch's `program.fbs`, which it never changes: Program.execution_plan,
#: ExecutionPlan.delegates, BackendDelegate.id.
_PLANS, _DELEGATES, _DELEGATE_ID = 1, 7, 0
COPY_AGAIN = "Copy the file again, or lower the model again."
#: A manifest as it stands in a program: ASCII JSON.
_VERSION = re.compile(rb'"format":\s*"mobizo",\s*"format_version":\s*(\d+)')


@dataclass(frozen=True)
class Identity:
    """What tells that a path still leads to the same, unchanged file."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Self:
        """From ``os.stat`` or ``os.fstat``."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_that_of(self, path: Path) -> bool:
        """Whether the file at ``path`` is still this one."""
        try:
            return Identity.of(path.stat()) == self
        except OSError:
            return False


@dataclass(frozen=True)
class Container:
    """A program file that was looked at: its identity, and its hash unless that was not asked for."""

    identity: Identity
    hash: FileHash | None


def examine(path: Path, *, verify: bool = True) -> Container:
    """Check that ``path`` is a .pte file and whole; with ``verify``, that its bytes are those that were written.

    Raises:
        ProgramFileError: missing, unreadable, not a .pte, shorter than its own header says, or not as its footer says.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError as error:
        raise ProgramFileError(path, "no such file", "Check the path; `mobizo lower` writes such a file.") from error
    except OSError as error:
        raise ProgramFileError(path, f"cannot be read ({error.strerror})", "Check the path.") from error
    try:
        identity = Identity.of(os.fstat(descriptor))
        program_size = _check_header(path, os.pread(descriptor, 64, 0), identity.size)
        found = check_footer(descriptor) if verify else None
        if found is not None and not found.has_footer:
            _check_may_lack_footer(path, descriptor, program_size)
    except FooterError as error:
        raise ProgramFileError(path, f"damaged: {error}", COPY_AGAIN) from error
    except OSError as error:
        raise ProgramFileError(path, f"cannot be read ({error.strerror})", "Check the disk.") from error
    finally:
        os.close(descriptor)
    return Container(identity, found)


def delegates_of(path: Path) -> frozenset[str]:
    """The names of the delegates that the methods of a program call, from its flatbuffer.

    Only for a program whose structure the runtime has verified: an offset is followed wherever it leads.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        plans = _tables(data, _vector(data, _UINT.unpack_from(data, 0)[0], _PLANS))
        delegates = (each for plan in plans for each in _tables(data, _vector(data, plan, _DELEGATES)))
        names = (_vector(data, each, _DELEGATE_ID) for each in delegates)
        return frozenset(data[at + 4 : at + 4 + _UINT.unpack_from(data, at)[0]].decode() for at in names if at)


def _vector(data: mmap.mmap, table: int, field: int) -> int:
    """Where the vector or string in a table's field begins, with its length; 0: the table has none."""
    vtable = table - _INT.unpack_from(data, table)[0]
    slot = 4 + 2 * field
    offset = _USHORT.unpack_from(data, vtable + slot)[0] if slot < _USHORT.unpack_from(data, vtable)[0] else 0
    return table + offset + _UINT.unpack_from(data, table + offset)[0] if offset else 0


def _tables(data: mmap.mmap, vector: int) -> list[int]:
    """Where the tables of a vector are."""
    places = range(vector + 4, vector + 4 + 4 * _UINT.unpack_from(data, vector)[0], 4) if vector else ()
    return [place + _UINT.unpack_from(data, place)[0] for place in places]


def without_footer(path: Path) -> ProgramFileError:
    """The error of a program that must have a footer and has none."""
    return ProgramFileError(path, "damaged: the footer at its end is missing", COPY_AGAIN)


def _check_may_lack_footer(path: Path, descriptor: int, program_size: int) -> None:
    """Only programs of format 1 have no footer; the version is looked for without the runtime's help."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
        match = _VERSION.search(data, 0, program_size)
        if match is not None and int(match.group(1)) > 1:
            raise without_footer(path)


def _check_header(path: Path, head: bytes, size: int) -> int:
    """The size of the flatbuffer with the program."""
    if len(head) < 8 or not (head[4:6] == b"ET" and head[6:8].isdigit()):
        raise ProgramFileError(
            path,
            f"not a .pte file: expected the identifier `ET` and two digits at byte 4, found {head[4:8]!r}",
            "Give the .pte that `mobizo lower` or `lowered.save(...)` wrote.",
        )
    if len(head) < _HEAD.size + _SEGMENT_SIZE.size:
        raise ProgramFileError(path, f"truncated: {size} bytes, less than its header", COPY_AGAIN)
    _, _, magic, length, program_size, segment_base = _HEAD.unpack_from(head)
    if magic != b"eh00":
        # A program without segments needs no extended header; the runtime verifies all of its bytes by itself.
        return size
    # The third size is absent from headers of the first ExecuTorch releases, which are 24 bytes long.
    segment_size = _SEGMENT_SIZE.unpack_from(head, _HEAD.size)[0] if length >= 32 else 0
    needed = max(program_size, segment_base + segment_size if segment_base else 0)
    if size < needed:
        raise ProgramFileError(path, f"truncated: its header promises {needed} bytes, it has {size}", COPY_AGAIN)
    return program_size
