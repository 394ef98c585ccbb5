"""The lines of a journal, as values and as text."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Set
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from runtime_driver.format import contributions as contributed
from runtime_driver.format import strict_json
from runtime_driver.format.contributions import Contribution, Update
from runtime_driver.format.numbers import as_float32

JOURNAL_FORMAT = "mobizo-journal"
#: The version that is written. Its checksums are chained: each covers the lines before it too. Version 1, whose
#: checksums cover a line each, is read and continued as it is.
JOURNAL_VERSION = 2
#: The version of a run of several workers: its records hold contributions, and its header how they combine.
SHARED_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)


class RecordError(ValueError):
    """A line that is not a record; the reader adds the file and the line number."""


@dataclass(frozen=True)
class Header:
    """The first line: what the run is.

    ``steps``, ``lr`` and ``eps`` are there for people; what each step really used is in its own record.
    ``initial_adapter`` is the SHA-256 of the trainable tensors at step 0, ``data`` an optional fingerprint. ``combine``
    is the rule by which contributions become an update; empty for a run of one process, whose records hold none.
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
    combine: str = ""


@dataclass(frozen=True)
class Record:
    """One step. Floats are float32 values, written with as many digits as bring back the same bits.

    A step that perturbs nothing has an ``eps`` of 0. One of an exact gradient has no projected gradients; ``state`` is
    the SHA-256 of adapter and optimizer after it. Other steps have none: their state follows from their numbers.

    With ``contributions``, ``projected_gradients`` and ``loss`` are what they combine to (q values for each seed among
    them), and the line has the contributions in the place of ``projected_gradients``.
    """

    step: int
    seed: int
    lr: float
    eps: float
    projected_gradients: tuple[float, ...]
    loss: float
    # Not in its text, by which older snapshots know their record.
    state: str = field(default="", repr=False)
    contributions: tuple[Contribution, ...] = field(default=(), repr=False)

    @property
    def updates(self) -> tuple[Update, ...]:
        """The calls of ``apply`` that make this step: (seed, learning rate, projected gradients)."""
        if not self.contributions:
            return ((self.seed, self.lr, self.projected_gradients),)
        return contributed.updates(self.contributions, self.projected_gradients, self.lr)


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


def encode_header(header: Header, version: int | None = None) -> bytes:
    """The header's line; ``version``: None for the one that the run needs."""
    fields_ = asdict(header)
    if not header.combine:
        del fields_["combine"]
    needed = SHARED_VERSION if header.combine else JOURNAL_VERSION
    return encode({"format": JOURNAL_FORMAT, "version": needed if version is None else version, **fields_})


def decode_header(line: bytes) -> tuple[Header, int]:
    """The header and the journal's version. Raises :class:`RecordError` for a line that is not a known header."""
    data = decode(line)
    if data.pop("format", None) != JOURNAL_FORMAT:
        raise RecordError(f"expected the header of a {JOURNAL_FORMAT}")
    version = data.pop("version", None)
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise RecordError(f"expected journal version {', '.join(map(str, READABLE_VERSIONS))}, found {version!r}")
    _check_fields(data, Header, without=set() if version == SHARED_VERSION else {"combine"})
    for name in ("seed", "steps", "queries"):
        _check_integer(name, data[name])
    if version == SHARED_VERSION and (data["combine"] not in list(contributed.RULES) or not data["queries"]):
        raise RecordError(f"expected one of {sorted(contributed.RULES)} in `combine`, and queries")
    for name in ("program_id", "lr", "eps", "noise", "initial_adapter", "data"):
        if not isinstance(data[name], str) and not (name == "data" and data[name] is None):
            raise RecordError(f"expected text in `{name}`, found {data[name]!r}")
    if data["seed"] >= 1 << 63:
        raise RecordError(f"expected a seed below 2**63, found {data['seed']}")
    return Header(**data), version


def encode_record(record: Record, before: int = 0) -> bytes:
    """The record's line."""
    fields_ = asdict(record)
    del fields_["projected_gradients" if record.contributions else "contributions"]
    if not record.state:
        del fields_["state"]
    return encode(fields_, before)


def decode_record(line: bytes, queries: int, before: int = 0, combine: str = "") -> Record:
    """A record of that many queries; ``combine``: the header's.

    Without queries, the state after the step must be there.

    Raises:
        RecordError: the line is not such a record.
    """
    data = decode(line, before)
    without = {"projected_gradients" if combine else "contributions"} | ({"state"} if queries else set())
    _check_fields(data, Record, without=without)
    if not queries and not (isinstance(data["state"], str) and re.fullmatch("[0-9a-f]{64}", data["state"])):
        raise RecordError(f"expected a SHA-256 in `state`, found {data['state']!r}")
    for name in ("step", "seed"):
        _check_integer(name, data[name])
    numbers = {name: _float32(data[name]) for name in ("lr", "eps", "loss")}
    if not combine:
        return Record(**{**data, **numbers, "projected_gradients": _gradients(data["projected_gradients"], queries)})
    contributions = _contributions(data.pop("contributions"), queries)
    gradients, loss = contributed.combined(contributions, combine)
    if not all(map(math.isfinite, gradients)) or loss != numbers["loss"]:
        raise RecordError(f"expected contributions that combine to the loss {data['loss']!r}, found {loss!r}")
    return Record(**{**data, **numbers}, projected_gradients=gradients, contributions=contributions)


def _contributions(found: object, queries: int) -> tuple[Contribution, ...]:
    if not isinstance(found, list) or not found:
        raise RecordError("expected a list of contributions")
    result: list[Contribution] = []
    for each in found:
        if not isinstance(each, dict):
            raise RecordError(f"expected a contribution, found {type(each).__name__}")
        _check_fields(each, Contribution)
        for name in ("worker", "seed"):
            _check_integer(name, each[name])
        weight, loss = _float32(each["weight"]), _float32(each["loss"])
        if weight <= 0 or (result and each["worker"] <= result[-1].worker):
            raise RecordError("expected weights above 0, and contributions in the order of their workers")
        gradients = _gradients(each["projected_gradients"], queries)
        result.append(Contribution(each["worker"], each["seed"], weight, gradients, loss))
    return tuple(result)


def _gradients(found: object, queries: int) -> tuple[float, ...]:
    if not isinstance(found, list) or len(found) != queries:
        raise RecordError(f"expected {queries} projected gradients")
    return tuple(map(_float32, found))


def _float32(value: object) -> float:
    if not _is_float32(value):
        raise RecordError(f"expected a float32, found {value!r}")
    return float(value)  # pyright: ignore[reportArgumentType]


def _is_float32(value: object) -> bool:
    # `true` is an int to Python.
    if type(value) is int:
        return abs(value) < 1 << 128 and as_float32(value) == value
    return isinstance(value, float) and math.isfinite(value) and as_float32(value) == value


def _check_integer(name: str, value: object) -> None:
    if type(value) is not int or value < 0:
        raise RecordError(f"expected a non-negative integer in `{name}`, found {value!r}")


def _check_fields(
    data: dict[str, Any], kind: type[Header | Record | Contribution], without: Set[str] = frozenset()
) -> None:
    expected = {each.name for each in fields(kind)} - without
    if set(data) != expected:
        raise RecordError(f"expected the fields {sorted(expected)}, found {sorted(data)}")
