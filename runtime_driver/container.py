"""A look at a .pte file's bytes before the runtime sees them.

A .pte is a flatbuffer followed by segments (weights, delegate blobs). The runtime verifies the flatbuffer; whether the
segments are all there only the sizes in the extended header tell, and a mapped file that is too short ends the process
with SIGBUS at the first touch of a missing page. Hence this check.
"""

from __future__ import annotations

import struct
from pathlib import Path

from runtime_driver.errors import ProgramFileError

#: Flatbuffer root offset and file identifier, then the extended header: magic, length, three 64-bit sizes.
_HEAD = struct.Struct("<I4s4sIQQ")
_SEGMENT_SIZE = struct.Struct("<Q")
_COPY_AGAIN = "Copy the file again, or lower the model again."


def check_container(path: Path) -> None:
    """Check that ``path`` is a .pte file and whole.

    Raises:
        ProgramFileError: missing, unreadable, not a .pte, or shorter than its own header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError as error:
        raise ProgramFileError(path, "no such file", "Check the path; `mobizo lower` writes such a file.") from error
    except OSError as error:
        raise ProgramFileError(path, f"cannot be read ({error.strerror})", "Check the path.") from error
    if len(head) < 8 or not (head[4:6] == b"ET" and head[6:8].isdigit()):
        raise ProgramFileError(
            path,
            f"not a .pte file: expected the identifier `ET` and two digits at byte 4, found {head[4:8]!r}",
            "Give the .pte that `mobizo lower` or `lowered.save(...)` wrote.",
        )
    if len(head) < _HEAD.size + _SEGMENT_SIZE.size:
        raise ProgramFileError(path, f"truncated: {size} bytes, less than its header", _COPY_AGAIN)
    _, _, magic, length, program_size, segment_base = _HEAD.unpack_from(head)
    if magic != b"eh00":
        # A program without segments needs no extended header; the runtime verifies all of its bytes by itself.
        return
    # The third size is absent from headers of the first ExecuTorch releases, which are 24 bytes long.
    segment_size = _SEGMENT_SIZE.unpack_from(head, _HEAD.size)[0] if length >= 32 else 0
    needed = max(program_size, segment_base + segment_size if segment_base else 0)
    if size < needed:
        raise ProgramFileError(path, f"truncated: its header promises {needed} bytes, it has {size}", _COPY_AGAIN)
