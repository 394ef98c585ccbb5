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

from runtime_driver import optimizer_state
from runtime_driver.adapter_io import adapter_sha256, checked_adapter, read_tensors, write_tensors
from runtime_driver.errors import AdapterError, JournalError, JournalMismatchError, SnapshotWarning
from runtime_driver.format.records import Header, Record
from runtime_driver.format.temporary import remove_leftovers

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.format import Manifest
    from runtime_driver.journal import JournalContents
    from runtime_driver.schedule import Schedule

Adapter = dict[str, "Tensor"]
#: An adapter with the optimizer's state, by name.
State = dict[str, "Tensor"]
#: (state, record) -> the state after that record's step.
Apply = Callable[[State, Record], State]

#: What may differ between the session and the journal it continues: prose for people, and a longer run.
_NOT_COMPARED = ("steps", "lr", "eps")


def initial_path(journal: Path) -> Path:
    """Where a journal's own initial adapter is kept."""
    return journal.with_name(f"{journal.name}.initial.safetensors")


def snapshot_path(journal: Path) -> Path:
    """Where a journal's latest snapshot is kept."""
    return journal.with_name(f"{journal.name}.snapshot.safetensors")


def remove_leftovers_beside(journal: Path) -> None:
    """Remove what killed processes left of their writes beside the journal; the caller holds its lock."""
    for path in (initial_path(journal), snapshot_path(journal)):
        remove_leftovers(path)


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
        AdapterError: no candidate has the hash, and the file beside the journal is missing, damaged or of another run.
    """
    for candidate in candidates:
        if adapter_sha256(candidate) == header.initial_adapter:
            return candidate
    stored = initial_path(path)
    if not stored.exists():
        raise AdapterError(
            f"{path}: the run started from an adapter with the SHA-256 {header.initial_adapter}, which is neither the "
            f"program's nor the session's, and {stored} is missing. Restore that file, or load the adapter first "
            "(session.load_adapter, --adapter)."
        )
    found = checked_adapter(manifest.trainable_adapter, read_tensors(stored)[0])
    if adapter_sha256(found) != header.initial_adapter:
        raise AdapterError(
            f"{stored}: damaged, or of another run: expected an adapter with the SHA-256 {header.initial_adapter}, "
            f"found {adapter_sha256(found)}. Restore the file from a copy, or load the adapter that the run started "
            "from first (session.load_adapter, --adapter)."
        )
    return found


def replay(
    path: Path,
    contents: JournalContents,
    manifest: Manifest,
    initial: State,
    apply: Apply,
    last: int | None = None,
) -> State:
    """The state after the journal's steps before ``last`` (after all of them for ``None``).

    Raises:
        JournalError: the journal is shorter than ``last``.
    """
    count = len(contents.records) if last is None else last
    if not 0 <= count <= len(contents.records):
        raise JournalError(f"{path}: has {len(contents.records)} steps, {count} were asked for. Ask for fewer.")
    state, first = initial, 0
    snapshot = read_snapshot(path, contents, manifest)
    if snapshot is not None and snapshot[1] <= count:
        state, first = snapshot
    for record in contents.records[first:count]:
        state = apply(state, record)
    return state


def write_snapshot(path: Path, header: Header, record: Record, end: int, state: State) -> None:
    """Keep the state after ``record``'s step beside the journal; ``end``: the checksum of the record's line.

    Raises:
        AdapterError: the file system refuses.
    """
    write_tensors(snapshot_path(path), state, _snapshot_key(header, record, end, adapter_sha256(state)))


def write_initial(path: Path, adapter: Adapter) -> None:
    """Keep the adapter at step 0 beside the journal. Raises :class:`AdapterError`."""
    write_tensors(initial_path(path), adapter, {"sha256": adapter_sha256(adapter)})


def _snapshot_key(header: Header, record: Record, end: int, sha256: str) -> dict[str, str]:
    """What ties a snapshot to one line of one journal, and to its own bytes."""
    return {
        "initial_adapter": header.initial_adapter,
        "program_id": header.program_id,
        "record": repr(record),
        "checksum": f"{end:08x}",
        "sha256": sha256,
    }


def read_snapshot(path: Path, contents: JournalContents, manifest: Manifest) -> tuple[State, int] | None:
    """The snapshot and the number of steps in it, if it is undamaged and belongs to this very journal.

    The journal (and, for exact gradients, the batches) are enough, a snapshot only saves time: what cannot be proved is
    not used.
    """
    stored = snapshot_path(path)
    if not stored.exists():
        return None
    try:
        tensors, metadata = read_tensors(stored)
        state = _checked_state(manifest, tensors)
    except AdapterError as error:
        _ignore_snapshot(str(error))
        return None
    if "sha256" not in metadata:
        _ignore_snapshot(f"{stored}: written by an earlier release, without a hash of its tensors.")
        return None
    sha256 = adapter_sha256(state)
    if metadata["sha256"] != sha256:
        _ignore_snapshot(f"{stored}: damaged: its tensors are not those that it has the hash of.")
        return None
    for record, end in zip(reversed(contents.records), reversed(contents.checksums), strict=True):
        if metadata == _snapshot_key(contents.header, record, end, sha256):
            return state, record.step + 1
    _ignore_snapshot(f"{stored}: damaged, or of another run: it belongs to no line of this journal.")
    return None


def _checked_state(manifest: Manifest, tensors: State) -> State:
    """Raises :class:`AdapterError` for tensors that are not an adapter and a state of the program's optimizer."""
    expected = optimizer_state.fresh(manifest)
    adapter = checked_adapter(manifest.trainable_adapter, {k: v for k, v in tensors.items() if k not in expected})
    for name, zeros in expected.items():
        found = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (zeros.dtype, zeros.shape):
            have = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            raise AdapterError(f"`{name}`: expected {zeros.dtype} {list(zeros.shape)}, found {have}.")
    return {**adapter, **{name: tensors[name] for name in expected}}


def _ignore_snapshot(reason: str) -> None:
    warnings.warn(f"Snapshot ignored, replaying from the first step. {reason}", SnapshotWarning, stacklevel=5)
