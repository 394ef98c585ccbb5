"""The footer of a program file, with the SHA-256 of everything before it.

ExecuTorch finds what it reads by offsets from the file's start, so it never sees the footer. Both sides know it:
`lowering` writes it, the driver checks it before the runtime sees the file.

    SHA-256 (32 bytes) | bytes before the footer (uint64) | footer version (uint32) | magic (8 bytes), little-endian
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, cast

FOOTER_VERSION = 1
_MAGIC = b"\x89MOBIZO\n"
_FOOTER = struct.Struct("<32sQI8s")
FOOTER_BYTES = _FOOTER.size
_CHUNK = 1 << 20


class FooterError(ValueError):
    """A file that is not what its footer says."""


@dataclass(frozen=True)
class FileHash:
    """Size and SHA-256 of a whole file, footer included; ``has_footer``: it has one, which is right."""

    bytes: int
    sha256: str
    has_footer: bool = True


class _Hashing:
    """A file to write to that hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)


def write_with_footer(file: BinaryIO, write: Callable[[BinaryIO], object]) -> FileHash:
    """Let ``write`` write a program to ``file``, then the footer; the hash of the whole."""
    hashing = _Hashing(file)
    write(cast("BinaryIO", hashing))
    hashing.write(_FOOTER.pack(hashing.digest.digest(), hashing.bytes, FOOTER_VERSION, _MAGIC))
    return FileHash(hashing.bytes, hashing.digest.hexdigest())


def with_footer(program: bytes) -> bytes:
    """A program's bytes with the footer."""
    buffer = io.BytesIO()
    write_with_footer(buffer, lambda file: file.write(program))
    return buffer.getvalue()


def check_footer(descriptor: int) -> FileHash:
    """Read a file once, in chunks, and check its footer if it has one.

    Raises:
        FooterError: the bytes are not those that were written, or the footer is of a version that this release does not
            know.
        OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    head = max(size - FOOTER_BYTES, 0)
    footer = os.pread(descriptor, FOOTER_BYTES, head)
    expected: bytes | None = None
    if len(footer) == FOOTER_BYTES and footer.endswith(_MAGIC):
        expected, covered, version, _ = _FOOTER.unpack(footer)
        if version != FOOTER_VERSION:
            raise FooterError(f"its footer is of version {version}, this release knows version {FOOTER_VERSION}")
        if covered != head:
            raise FooterError(f"its footer covers {covered} bytes, but {head} come before it")
    digest = hashlib.sha256()
    _read(descriptor, head, digest)
    if expected is not None and digest.digest() != expected:
        raise FooterError(f"expected SHA-256 {expected.hex()}, found {digest.hexdigest()}")
    digest.update(footer)
    return FileHash(size, digest.hexdigest(), expected is not None)


def _read(descriptor: int, size: int, digest: hashlib._Hash) -> None:
    chunk = memoryview(bytearray(_CHUNK))
    place = 0
    while place < size:
        count = os.preadv(descriptor, [chunk[: min(_CHUNK, size - place)]], place)
        if count == 0:
            raise FooterError(f"the file ended after {place} of {size} bytes while it was read")
        digest.update(chunk[:count])
        place += count
