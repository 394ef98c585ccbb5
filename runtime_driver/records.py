"""The lines of a journal, as values and as text."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

from runtime_driver.schedule import as_float32

JOURNAL_FORMAT = "mobizo-journal"
JOURNAL_VERSION = 1


class RecordError(ValueError):
    """A line that is not a record; the reader adds the file and the line number."""


@dataclass(frozen=True)
class Header:
    """The first line: what the run is.

    ``steps``, ``lr`` and ``eps`` are there for people; what each step really used is in its own record.
    ``initial_adapter`` is the SHA-256 of the trainable tensors at step 0, ``data`` an optional fingerprint.
    """

    program_id: str
    seed: int
    steps: int
    lr: str
    eps: str
    noise: str
    queries: int
    initial_adapter: str
    data: str | None = None


@dataclass(frozen=True)
class Record:
    """One step. Floats are float32 values, written with as many digits as bring back the same bits."""

    step: int
    seed: int
    lr: float
    eps: float
    projected_gradients: tuple[float, ...]
    loss: float


def encode(fields_: dict[str, Any]) -> bytes:
    """One JSON line that ends in the CRC-32 of what precedes it, and a newline."""
    body = json.dumps(fields_, separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode()):08x}"}}\n'.encode()


def decode(line: bytes) -> dict[str, Any]:
    """The fields of a line, without the checksum.

    Raises:
        RecordError: not JSON, not an object, or not what its checksum says.
    """
    try:
        data = json.loads(line)
    except ValueError as error:
        raise RecordError("not JSON") from error
    if not isinstance(data, dict):
        raise RecordError(f"expected a JSON object, found {type(data).__name__}")
    crc = data.pop("crc", None)
    try:
        again = encode(data)
    except ValueError as error:
        raise RecordError("holds NaN or Infinity") from error
    if crc is None or again.rstrip(b"\n") != line.rstrip(b"\n"):
        raise RecordError("the line does not match its checksum")
    return data


def encode_header(header: Header) -> bytes:
    """The header's line."""
    return encode({"format": JOURNAL_FORMAT, "version": JOURNAL_VERSION, **asdict(header)})


def decode_header(line: bytes) -> Header:
    """Raises :class:`RecordError` for a line that is not a header of this version."""
    data = decode(line)
    if data.pop("format", None) != JOURNAL_FORMAT:
        raise RecordError(f"expected the header of a {JOURNAL_FORMAT}")
    version = data.pop("version", None)
    if version != JOURNAL_VERSION:
        raise RecordError(f"expected journal version {JOURNAL_VERSION}, found {version!r}")
    _check_fields(data, Header)
    return Header(**data)


def encode_record(record: Record) -> bytes:
    """The record's line."""
    return encode(asdict(record))


def decode_record(line: bytes, queries: int) -> Record:
    """Raises :class:`RecordError` for a line that is not a record with that many projected gradients."""
    data = decode(line)
    _check_fields(data, Record)
    gradients = data["projected_gradients"]
    if not isinstance(gradients, list) or len(gradients) != queries:
        raise RecordError(f"expected {queries} projected gradients")
    for value in (*gradients, data["lr"], data["eps"], data["loss"]):
        if not isinstance(value, (int, float)) or not math.isfinite(value) or as_float32(value) != value:
            raise RecordError(f"expected a float32, found {value!r}")
    for name in ("step", "seed"):
        if not isinstance(data[name], int) or data[name] < 0:
            raise RecordError(f"expected a non-negative integer in `{name}`, found {data[name]!r}")
    data["projected_gradients"] = tuple(float(value) for value in gradients)
    return Record(**data)


def _check_fields(data: dict[str, Any], kind: type[Header] | type[Record]) -> None:
    expected = {field.name for field in fields(kind)}
    if set(data) != expected:
        raise RecordError(f"expected the fields {sorted(expected)}, found {sorted(data)}")
