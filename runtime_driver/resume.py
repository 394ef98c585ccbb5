"""From a journal back to an adapter: checks that it is this run's, then replays it, from a snapshot where there is one.

Beside ``run.jsonl`` there may be ``run.jsonl.initial.safetensors`` (the adapter at step 0, when it is not the one in
the .pte) and ``run.jsonl.snapshot.safetensors`` (the adapter after some step, so that a long run resumes quickly).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver.adapter_io import adapter_sha256, checked_adapter, read_tensors, write_tensors
from runtime_driver.errors import AdapterError, JournalError, JournalMismatchError
from runtime_driver.records import Header, Record

if TYPE_CHECKING:
    from torch import Tensor

    from mobizo_manifest import Manifest
    from runtime_driver.journal import JournalContents
    from runtime_driver.schedule import Schedule

Adapter = dict[str, "Tensor"]
#: (adapter, record) -> the adapter after that record's step.
Apply = Callable[[Adapter, Record], Adapter]

#: What may differ between the session and the journal it continues: prose for people, and a longer run.
_NOT_COMPARED = ("steps", "lr", "eps")


def initial_path(journal: Path) -> Path:
    """Where a journal's own initial adapter is kept."""
    return journal.with_name(f"{journal.name}.initial.safetensors")


def snapshot_path(journal: Path) -> Path:
    """Where a journal's latest snapshot is kept."""
    return journal.with_name(f"{journal.name}.snapshot.safetensors")


def check_program(path: Path, header: Header, manifest: Manifest) -> None:
    """Raises :class:`JournalMismatchError` when the journal was written by another program."""
    for name, value in (
        ("program_id", manifest.program_id),
        ("noise", noise_name(manifest)),
        ("queries", manifest.estimator.queries),
    ):
        if getattr(header, name) != value:
            raise JournalMismatchError(path, name, getattr(header, name), value)


def check_same_run(path: Path, contents: JournalContents, wanted: Header, lr: Schedule, eps: Schedule) -> None:
    """Check that a run described by ``wanted`` would have written this journal.

    Raises:
        JournalMismatchError: the first field that differs, of the header or of a step.
    """
    header = contents.header
    for field in fields(Header):
        found, session = getattr(header, field.name), getattr(wanted, field.name)
        unknown_data = field.name == "data" and None in (found, session)
        if field.name not in _NOT_COMPARED and not unknown_data and found != session:
            raise JournalMismatchError(path, field.name, found, session)
    for record in contents.records:
        for name, found, session in (("lr", record.lr, lr(record.step)), ("eps", record.eps, eps(record.step))):
            if found != session:
                raise JournalMismatchError(path, f"{name} of step {record.step}", found, session)


def noise_name(manifest: Manifest) -> str:
    """``gaussian/1``: kind and version of the noise."""
    return f"{manifest.noise.kind}/{manifest.noise.version}"


def initial_adapter(path: Path, header: Header, manifest: Manifest, candidates: list[Adapter]) -> Adapter:
    """The adapter at step 0: the candidate with the header's hash, else the file beside the journal.

    Raises:
        JournalMismatchError: none of them has the header's hash.
        AdapterError: the file beside the journal is damaged.
    """
    stored = initial_path(path)
    if stored.exists():
        candidates = [*candidates, checked_adapter(manifest.trainable_adapter, read_tensors(stored)[0])]
    for candidate in candidates:
        if adapter_sha256(candidate) == header.initial_adapter:
            return candidate
    raise JournalMismatchError(
        path, "initial_adapter", header.initial_adapter, [adapter_sha256(candidate) for candidate in candidates]
    )


def replay(
    path: Path,
    contents: JournalContents,
    manifest: Manifest,
    initial: Adapter,
    apply: Apply,
    last: int | None = None,
) -> Adapter:
    """The adapter after the journal's steps before ``last`` (after all of them for ``None``).

    Raises:
        JournalError: the journal is shorter than ``last``.
    """
    count = len(contents.records) if last is None else last
    if not 0 <= count <= len(contents.records):
        raise JournalError(f"{path}: has {len(contents.records)} steps, {count} were asked for. Ask for fewer.")
    adapter, first = initial, 0
    snapshot = _read_snapshot(path, contents, manifest)
    if snapshot is not None and snapshot[1] <= count:
        adapter, first = snapshot
    for record in contents.records[first:count]:
        adapter = apply(adapter, record)
    return adapter


def write_snapshot(path: Path, header: Header, record: Record, adapter: Adapter) -> None:
    """Keep the adapter after ``record``'s step beside the journal. Raises :class:`AdapterError`."""
    write_tensors(snapshot_path(path), adapter, _snapshot_key(header, record))


def write_initial(path: Path, adapter: Adapter) -> None:
    """Keep the adapter at step 0 beside the journal. Raises :class:`AdapterError`."""
    write_tensors(initial_path(path), adapter, {"sha256": adapter_sha256(adapter)})


def _snapshot_key(header: Header, record: Record) -> dict[str, str]:
    return {"initial_adapter": header.initial_adapter, "program_id": header.program_id, "record": repr(record)}


def _read_snapshot(path: Path, contents: JournalContents, manifest: Manifest) -> tuple[Adapter, int] | None:
    """The snapshot and the number of steps in it, if it belongs to this very journal; replay works without one."""
    stored = snapshot_path(path)
    if not stored.exists():
        return None
    try:
        tensors, metadata = read_tensors(stored)
        adapter = checked_adapter(manifest.trainable_adapter, tensors)
    except AdapterError as error:
        # The journal alone is enough; the snapshot only saves time.
        warnings.warn(f"Snapshot ignored, replaying from step 0. {error}", stacklevel=2)
        return None
    for record in reversed(contents.records):
        if metadata == _snapshot_key(contents.header, record):
            return adapter, record.step + 1
    return None
