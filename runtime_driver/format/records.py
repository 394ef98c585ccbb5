"""The lines of a journal, as values and as text."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Set
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from runtime_driver.format import strict_json
from runtime_driver.format.numbers import as_float32

JOURNAL_FORMAT = "mobizo-journal"
#: The version that is written. Its checksums are chained: each covers the lines before it too. Version 1, whose
#: checksums cover a line each, is read and continued as it is.
JOURNAL_VERSION = 2
READABLE_VERSIONS = (1, 2)


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
    """One step. Floats are float32 values, written with as many digits as bring back the same bits.

    A step that perturbs nothing has an ``eps`` of 0. One of an exact gradient has no projected gradients; ``state`` is
    the SHA-256 of adapter and optimizer after it. Other steps have none: their state follows from their numbers.
    """

    step: int
    seed: int
    lr: float
    eps: float
    projected_gradients: tuple[float, ...]
    loss: float
    # Not in its text, by which older snapshots know their record.
    state: str = field(default="", repr=False)


def encode(fields_: dict[str, Any], before: int = 0) -> bytes:
    """One JSON line that ends in the CRC-32 of what precedes it, and a newline.

    ``before``: the checksum of the line before, from which a chained one goes on.
    """
    body = json.dumps(fields_, separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":"{zlib.crc32(body.encode(), before):08x}"}}\n'.encode()


def checksum(line: bytes) -> int:
    """The checksum in a line that :func:`encode` wrote."""
    return int(line.rstrip(b"\n")[-10:-2], 16)


def decode(line: bytes, before: int = 0) -> dict[str, Any]:
    """The fields of a line, without the checksum.

    Raises:
        RecordError: not JSON, not an object, or not what its checksum says.
    """
    try:
        data = strict_json.loads(line)
    except strict_json.StrictJsonError as error:
        raise RecordError(f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise RecordError(f"expected a JSON object, found {type(data).__name__}")
    crc = data.pop("crc", None)
    try:
        again = encode(data, before)
    except ValueError as error:
        raise RecordError("holds a number that is not finite") from error
    if crc is None or again.rstrip(b"\n") != line.rstrip(b"\n"):
        covers = ", which covers the lines before it too: it is damaged, or of another journal" if before else ""
        raise RecordError(f"the line does not match its checksum{covers}")
    return data


def encode_header(header: Header, version: int = JOURNAL_VERSION) -> bytes:
    """The header's line."""
    return encode({"format": JOURNAL_FORMAT, "version": version, **asdict(header)})


def decode_header(line: bytes) -> tuple[Header, int]:
    """The header and the journal's version. Raises :class:`RecordError` for a line that is not a known header."""
    data = decode(line)
    if data.pop("format", None) != JOURNAL_FORMAT:
        raise RecordError(f"expected the header of a {JOURNAL_FORMAT}")
    version = data.pop("version", None)
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise RecordError(f"expected journal version {' or '.join(map(str, READABLE_VERSIONS))}, found {version!r}")
    _check_fields(data, Header)
    for name in ("seed", "steps", "queries"):
        _check_integer(name, data[name])
    for name in ("program_id", "lr", "eps", "noise", "initial_adapter", "data"):
        if not isinstance(data[name], str) and not (name == "data" and data[name] is None):
            raise RecordError(f"expected text in `{name}`, found {data[name]!r}")
    if data["seed"] >= 1 << 63:
        raise RecordError(f"expected a seed below 2**63, found {data['seed']}")
    return Header(**data), version


def encode_record(record: Record, before: int = 0) -> bytes:
    """The record's line."""
    fields_ = asdict(record)
    if not record.state:
        del fields_["state"]
    return encode(fields_, before)


def decode_record(line: bytes, queries: int, before: int = 0) -> Record:
    """Raises :class:`RecordError` for a line that is not a record with that many projected gradients.

    Without any, the state after the step must be there.
    """
    data = decode(line, before)
    _check_fields(data, Record, without={"state"} if queries else set())
    if not queries and not (isinstance(data["state"], str) and re.fullmatch("[0-9a-f]{64}", data["state"])):
        raise RecordError(f"expected a SHA-256 in `state`, found {data['state']!r}")
    gradients = data["projected_gradients"]
    if not isinstance(gradients, list) or len(gradients) != queries:
        raise RecordError(f"expected {queries} projected gradients")
    for value in (*gradients, data["lr"], data["eps"], data["loss"]):
        if not _is_float32(value):
            raise RecordError(f"expected a float32, found {value!r}")
    for name in ("step", "seed"):
        _check_integer(name, data[name])
    data["projected_gradients"] = tuple(float(value) for value in gradients)
    return Record(**{**data, **{name: float(data[name]) for name in ("lr", "eps", "loss")}})


def _is_float32(value: object) -> bool:
    # `true` is an int to Python.
    if type(value) is int:
        return abs(value) < 1 << 128 and as_float32(value) == value
    return isinstance(value, float) and math.isfinite(value) and as_float32(value) == value


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise RecordError(f"expected a non-negative integer in `{name}`, found {value!r}")


def _check_fields(data: dict[str, Any], kind: type[Header] | type[Record], without: Set[str] = frozenset()) -> None:
    expected = {each.name for each in fields(kind)} - without
    if set(data) != expected:
        raise RecordError(f"expected the fields {sorted(expected)}, found {sorted(data)}")
