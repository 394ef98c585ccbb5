"""The journal on disk: damage is found and named, a torn end is survived, two writers are kept apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runtime_driver
from runtime_driver import Session
from runtime_driver.format.records import (
    Record,
    checksum,
    decode_record,
    encode,
    encode_record,
)
from runtime_driver.journal import JournalWriter, parse_journal
from tests.driver import tiny

RUN: dict[str, Any] = {"lr": 0.5, "eps": 1e-2, "seed": 7}
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def journal(built_pte: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=path, snapshot_every=None)
    return path


@given(st.tuples(floats, floats), floats, floats)
def test_records_come_back_with_the_same_bits(gradients: tuple[float, float], lr: float, loss: float):
    record = Record(3, 5, lr, 0.5, gradients, loss)
    again = decode_record(encode_record(record), 2)
    assert again == record
    assert torch.equal(torch.tensor(again.projected_gradients), torch.tensor(gradients))


@given(st.data())
def test_any_truncation_leaves_whole_steps(journal_bytes: bytes, data: st.DataObject):
    size = data.draw(st.integers(0, len(journal_bytes)))
    contents = parse_journal(Path("run.jsonl"), journal_bytes[:size])
    lines = journal_bytes[:size].count(b"\n")
    assert (contents is None) == (lines == 0)
    if contents is not None:
        assert len(contents.records) == lines - 1


@given(st.data())
def test_any_changed_byte_is_noticed(journal_bytes: bytes, data: st.DataObject):
    """A flipped byte is an error; in the last newline it makes the last line a torn one. It never changes a number."""
    place = data.draw(st.integers(0, len(journal_bytes) - 1))
    flipped = bytes([journal_bytes[place] ^ data.draw(st.integers(1, 255))])
    damaged = journal_bytes[:place] + flipped + journal_bytes[place + 1 :]
    whole = parse_journal(Path("run.jsonl"), journal_bytes)
    assert whole is not None
    try:
        contents = parse_journal(Path("run.jsonl"), damaged)
    except runtime_driver.JournalCorruptError:
        return
    assert place == len(journal_bytes) - 1
    assert contents is not None
    assert contents.records == whole.records[:-1]


@pytest.fixture(scope="module")
def journal_bytes(built_pte: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "run.jsonl"
    Session(built_pte).fit(tiny.make_batches(3), 4, **RUN, journal=path, snapshot_every=None)
    return path.read_bytes()


@pytest.mark.parametrize("lost", [1, 2, 17, 60])
def test_a_torn_last_line_is_cut_and_run_again(built_pte: Path, journal: Path, lost: int):
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-lost])
    assert len(runtime_driver.read_journal(journal).records) == 5
    resumed = Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=journal)
    assert resumed.first_step == 5
    assert journal.read_bytes() == whole


def test_a_torn_header_starts_the_run_anew(built_pte: Path, journal: Path):
    whole = journal.read_bytes()
    journal.write_bytes(whole[:50])
    Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=journal)
    assert journal.read_bytes() == whole


@pytest.mark.parametrize("content", [b'{"text": "a film", "label": 1}', b"text,label\na film,1\n", b"\x00\x01"])
def test_somebody_elses_file_is_never_touched(built_pte: Path, tmp_path: Path, content: bytes):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(runtime_driver.JournalCorruptError, match="line 1"):
        Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line, before: line.replace(b'"step":2', b'"step":3'), "line 4: the line does not match its checksum"),
        (lambda line, before: b"", "line 4: not JSON"),
        (lambda line, before: b"[]", "line 4: expected a JSON object"),
        (lambda line, before: line[:40], "line 4: not JSON"),
        (lambda line, before: _edited(line, before, step=3), "line 4: expected step 2, found step 3"),
        (lambda line, before: _edited(line, before, seed=1), "line 4: seed 1 is not that of step 2"),
        (
            lambda line, before: _edited(line, before, projected_gradients=[0.5]),
            "line 4: expected 2 projected gradients",
        ),
        (lambda line, before: _edited(line, before, lr=0.1), "line 4: expected a float32, found 0.1"),
        (lambda line, before: _edited(line, before, more=1), "line 4: expected the fields"),
        (lambda line, before: _edited(line, before, step=True), "line 4: expected a non-negative integer in `step`"),
        (lambda line, before: _edited(line, before, loss=True), "line 4: expected a float32, found True"),
        (lambda line, before: _edited(line, before, loss=10**400), "line 4: expected a float32, found 1000"),
        (lambda line, before: _edited(line, before, loss="1"), "line 4: expected a float32, found '1'"),
        (lambda line, before: _edited(line, 0), "line 4: .* of another journal"),
        (lambda line, before: line.replace(b'"step":2', b'"step":2,"step":2'), "line 4: not JSON: .* given twice"),
        (lambda line, before: b"[" * 100_000, "line 4: not JSON: nested deeper than"),
        (lambda line, before: b'{"step":"\\ud800"}', "line 4: not JSON: a lone surrogate"),
        (lambda line, before: line[:-1] + b"\xff}", "line 4: not JSON: not UTF-8"),
        (lambda line, before: line + b"\r", "line 4: the line does not match"),
    ],
)
def test_damage_in_the_middle_names_its_line(built_pte: Path, journal: Path, change, message: str):
    lines = journal.read_bytes().splitlines()
    lines[3] = change(lines[3], checksum(lines[2]))
    damaged = b"\n".join(lines) + b"\n"
    journal.write_bytes(damaged)
    for use in (
        lambda: Session(built_pte).replay(journal),
        lambda: Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=journal),
    ):
        with pytest.raises(runtime_driver.JournalCorruptError, match=message) as caught:
            use()
        assert caught.value.line == 4
    assert journal.read_bytes() == damaged


def _edited(line: bytes, before: int, **changes) -> bytes:
    """The line with other values and a checksum that fits them."""
    fields = json.loads(line)
    del fields["crc"]
    return encode({**fields, **changes}, before).rstrip(b"\n")


def _with_header(journal: Path, **changes) -> None:
    """The journal with another header, and checksums that fit it."""
    first, *rest = journal.read_bytes().splitlines()
    lines = [_edited(first, 0, **changes)]
    for line in rest:
        lines.append(_edited(line, checksum(lines[-1])))
    journal.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize(
    ("field", "value"), [("program_id", "other"), ("noise", "rademacher/1"), ("noise", "gaussian/2")]
)
def test_a_journal_of_another_program_is_refused(built_pte: Path, journal: Path, field: str, value: str):
    _with_header(journal, **{field: value})
    for use in (
        lambda: Session(built_pte).replay(journal),
        lambda: Session(built_pte).fit(tiny.make_batches(3), 6, **RUN, journal=journal),
    ):
        with pytest.raises(runtime_driver.JournalMismatchError) as caught:
            use()
        assert caught.value.field == field


def test_a_later_journal_version_is_refused(built_pte: Path, journal: Path):
    _with_header(journal, version=4)
    with pytest.raises(runtime_driver.JournalCorruptError, match="expected journal version 1, 2, 3, found 4"):
        Session(built_pte).replay(journal)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", True),
        ("queries", True),
        ("queries", "2"),
        ("seed", 7.0),
        ("seed", 1 << 63),
        ("steps", True),
        ("program_id", 1),
        ("data", False),
        ("lr", None),
    ],
)
def test_a_header_of_other_types_is_refused(built_pte: Path, journal: Path, field: str, value: object):
    _with_header(journal, **{field: value})
    with pytest.raises(runtime_driver.JournalCorruptError, match="line 1: expected"):
        Session(built_pte).replay(journal)


def test_a_line_of_another_run_with_the_same_seed_is_refused(built_pte: Path, journal: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    Session(built_pte).fit(tiny.make_batches(3, seed=1), 6, **RUN, journal=other, snapshot_every=None)
    ours, theirs = (path.read_bytes().splitlines(keepends=True) for path in (journal, other))
    for place in range(1, 7):
        for mixed in (
            [*ours[:place], theirs[place], *ours[place + 1 :]],
            [*ours[:place], *theirs[place:]],
            [*theirs[:place], *ours[place:]],
        ):
            if mixed in (ours, theirs):
                continue  # the headers are the same: this is one of the two journals, whole
            journal.write_bytes(b"".join(mixed))
            with pytest.raises(runtime_driver.JournalCorruptError, match="of another journal"):
                Session(built_pte).replay(journal)


def test_a_journal_of_version_1_goes_on_as_one(built_pte: Path, journal: Path, tmp_path: Path):
    """Each line on its own, as version 0.1 wrote it; what that cannot prove is said once."""
    whole = Session(built_pte)
    whole.fit(tiny.make_batches(3), 9, **RUN)
    first, *rest = journal.read_bytes().splitlines()
    lines = [_edited(first, 0, version=1), *(_edited(line, 0) for line in rest)]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    for steps in (8, 9):
        session = Session(built_pte)
        with pytest.warns(runtime_driver.UnprovenWarning, match="journal of format 1") as told:
            session.fit(tiny.make_batches(3), steps, **RUN, journal=journal)
        assert len(told) == 1
    assert torch.equal(session.adapter[tiny.FQN_B], whole.adapter[tiny.FQN_B])
    first, *rest = journal.read_bytes().splitlines()
    assert json.loads(first)["version"] == 1
    assert rest == [_edited(line, 0) for line in rest]


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "NUL", "surrogate"])
def test_a_journal_that_is_no_file_is_not_waited_for(session: Session, tmp_path: Path, kind: str):
    path = tmp_path / "run.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/full")
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / ("run\0.jsonl" if kind == "NUL" else "run\ud800.jsonl")
    for use in (
        lambda: session.fit(tiny.make_batches(3), 2, **RUN, journal=path),
        lambda: session.replay(path),
    ):
        with pytest.raises(runtime_driver.JournalError, match="cannot"):
            use()


def test_two_writers_are_kept_apart(built_pte: Path, journal: Path):
    before = journal.read_bytes()
    with JournalWriter(journal), pytest.raises(runtime_driver.JournalLockedError, match="another process"):
        Session(built_pte).fit(tiny.make_batches(3), 7, **RUN, journal=journal)
    assert journal.read_bytes() == before
    Session(built_pte).fit(tiny.make_batches(3), 7, **RUN, journal=journal)


def test_a_full_disk_leaves_whole_lines(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.jsonl"
    real, calls = os.pwrite, []

    def short_write(descriptor: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        return real(descriptor, data[:20] if len(calls) == 4 else data, offset)

    monkeypatch.setattr(os, "pwrite", short_write)
    with pytest.raises(runtime_driver.JournalError, match="disk is full"):
        session.fit(tiny.make_batches(3), 6, **RUN, journal=path, snapshot_every=None)
    assert len(runtime_driver.read_journal(path).records) == 2
    monkeypatch.undo()
    again = Session(session.program.path)
    again.replay(path)
    assert torch.equal(again.adapter[tiny.FQN_B], session.adapter[tiny.FQN_B])


@pytest.mark.parametrize(("policy", "syncs"), [("step", 7), ("none", 0), (4, 3)])
def test_fsync_policy(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy, syncs: int):
    path, count = tmp_path / "run.jsonl", []
    real = os.fsync

    def counting(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == path:
            count.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    session.fit(tiny.make_batches(3), 6, **RUN, journal=path, fsync=policy, snapshot_every=None)
    assert len(count) == syncs
    assert len(runtime_driver.read_journal(path).records) == 6


@pytest.mark.parametrize("name", ["missing/run.jsonl", "."])
def test_a_journal_that_cannot_be_opened(session: Session, tmp_path: Path, name: str):
    with pytest.raises(runtime_driver.JournalError, match="cannot"):
        session.fit(tiny.make_batches(3), 6, **RUN, journal=tmp_path / name)
    with pytest.raises(runtime_driver.JournalError, match="cannot read"):
        session.replay(tmp_path / name)


def test_other_data_is_refused_when_it_says_who_it_is(session: Session, tmp_path: Path):
    class Source:
        def __init__(self, fingerprint: str):
            self.fingerprint = fingerprint

        def batch(self, step: int):
            return tiny.make_batches(1, seed=step)[0]

    session.fit(Source("a"), 2, **RUN, journal=tmp_path / "run.jsonl")
    session.fit(Source("a"), 3, **RUN, journal=tmp_path / "run.jsonl")
    with pytest.raises(runtime_driver.JournalMismatchError, match="`data` is 'a' in the journal, but 'b'"):
        session.fit(Source("b"), 4, **RUN, journal=tmp_path / "run.jsonl")
