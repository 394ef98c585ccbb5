"""Snapshots, initial adapters and temporaries: what is damaged is not used, what a kill left is removed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from runtime_driver import AdapterError, Session, SnapshotWarning
from runtime_driver.adapter_io import read_tensors
from runtime_driver.executor import Executor
from runtime_driver.format.temporary import remove_leftovers, temporary
from tests.driver import tiny
from tests.driver.test_training import same

RUN: dict[str, Any] = {"lr": 0.5, "eps": 1e-2, "seed": 7}


@pytest.fixture
def journal(built_pte: Path, tmp_path: Path) -> Path:
    """Six steps with a snapshot after the fourth, and an adapter of its own at the start."""
    path = tmp_path / "run.jsonl"
    session = Session(built_pte)
    session.adapter = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), 0.25)}
    session.fit(tiny.make_batches(3), 6, **RUN, journal=path, snapshot_every=4)
    return path


@pytest.fixture
def expected(built_pte: Path) -> dict[str, torch.Tensor]:
    session = Session(built_pte)
    session.adapter = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), 0.25)}
    session.fit(tiny.make_batches(3), 6, **RUN)
    return session.adapter


def snapshot_of(journal: Path) -> Path:
    return journal.with_name(f"{journal.name}.snapshot.safetensors")


def test_a_snapshot_spares_its_steps(session: Session, journal: Path, expected: dict, monkeypatch: pytest.MonkeyPatch):
    applied: list[int] = []
    real = Executor.apply_record
    monkeypatch.setattr(
        Executor, "apply_record", lambda self, a, record: (applied.append(record.step), real(self, a, record))[1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.replay(journal)
    assert applied == [4, 5]
    assert same(session.adapter, expected)


def test_no_flipped_bit_in_a_snapshot_is_used(session: Session, journal: Path, expected: dict):
    stored, chance = snapshot_of(journal), random.Random(0)
    whole = stored.read_bytes()
    tensors = range(len(whole) - 24, len(whole))
    for place in [*tensors, *(chance.randrange(len(whole)) for _ in range(60))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        stored.write_bytes(damaged)
        with pytest.warns(SnapshotWarning, match="Snapshot ignored") as told:
            session.replay(journal)
        assert len(told) == 1
        assert same(session.adapter, expected)


@pytest.mark.parametrize("change", ["nan", "shape", "hash", "no hash", "record", "pipe", "empty"])
def test_a_snapshot_that_cannot_be_proved(session: Session, journal: Path, expected: dict, change: str):
    stored = snapshot_of(journal)
    tensors, metadata = read_tensors(stored)
    if change == "nan":
        tensors[tiny.FQN_B][0, 0] = float("nan")
    elif change == "shape":
        tensors[tiny.FQN_B] = tensors[tiny.FQN_B].t().contiguous()
    elif change == "hash":
        metadata["sha256"] = "0" * 64
    elif change == "no hash":
        del metadata["sha256"]
    elif change == "record":
        metadata["record"] = metadata["record"].replace("step=3", "step=2")
    save_file(tensors, stored, metadata)
    if change in ("pipe", "empty"):
        stored.unlink()
        os.mkfifo(stored) if change == "pipe" else stored.touch()
    with pytest.warns(SnapshotWarning, match="replaying from the first step") as told:
        session.replay(journal)
    assert len(told) == 1
    assert same(session.adapter, expected)


@pytest.mark.parametrize("change", ["gone", "other", "pipe"])
def test_the_adapter_at_the_start_is_needed_and_proved(
    built_pte: Path, journal: Path, expected: dict, tmp_path: Path, change: str
):
    stored = journal.with_name(f"{journal.name}.initial.safetensors")
    whole = stored.read_bytes()
    stored.unlink()
    if change == "other":
        data = bytearray(whole)
        data[-2] ^= 1
        stored.write_bytes(data)
    elif change == "pipe":
        os.mkfifo(stored)
    session = Session(built_pte)
    with pytest.raises(AdapterError, match=r"run\.jsonl.*(missing|damaged|pipe)"):
        session.replay(journal)
    # With the adapter at hand the file is not needed.
    session.adapter = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), 0.25)}
    session.replay(journal)
    assert same(session.adapter, expected)


# What a kill leaves


def gone_process() -> int:
    done = subprocess.Popen(["/bin/true"])
    done.wait()
    return done.pid


def test_what_a_killed_run_left_is_removed_by_the_next(built_pte: Path, tmp_path: Path):
    journal, out, pid = tmp_path / "run.jsonl", tmp_path / "adapter", gone_process()
    leftovers = [
        tmp_path / f".run.jsonl.snapshot.safetensors.mobizo-{pid}-0123abcd",
        tmp_path / f".run.jsonl.initial.safetensors.mobizo-{pid}-0123abcd",
        tmp_path / f".adapter.mobizo-{pid}-0123abcd",
    ]
    for path in leftovers[:2]:
        path.write_bytes(b"half")
    leftovers[2].mkdir()
    (leftovers[2] / "adapter_model.safetensors").write_bytes(b"half")
    foreign = [
        tmp_path / ".run.jsonl.snapshot.safetensors.mine",
        tmp_path / f".other.jsonl.snapshot.safetensors.mobizo-{pid}-0123abcd",
        tmp_path / f".adapter.mobizo-{pid}-0123abcd.bak",
        tmp_path / ".adapter.settings",
        tmp_path / ".adapter.mobizo-x-0123abcd",
    ]
    for path in foreign:
        path.write_text("mine")
    link = tmp_path / f".adapter.mobizo-{pid}-00000000"
    link.symlink_to(tmp_path / ".adapter.settings")
    session = Session(built_pte)
    session.fit(tiny.make_batches(2), 2, **RUN, journal=journal)
    session.save_adapter(out)
    assert not [path for path in leftovers if path.exists()]
    assert all(path.read_text() == "mine" for path in foreign)
    assert link.is_symlink()
    inside = out / f".adapter_model.safetensors.mobizo-{pid}-0123abcd"
    inside.write_bytes(b"half")
    session.save_adapter(out)
    assert not inside.exists()


def test_a_live_writer_keeps_its_temporary(tmp_path: Path):
    """Also where its process has another number here, or is ours."""
    target = tmp_path / "adapter"
    for directory in (False, True):
        with temporary(target, directory=directory) as mine:
            os.utime(mine, (1, 1))
            assert remove_leftovers(target) == []
            elsewhere = mine.with_name(f".adapter.mobizo-{gone_process()}-89abcdef")
            mine.rename(elsewhere)
            assert remove_leftovers(target) == []
            elsewhere.rename(mine)
        assert list(tmp_path.iterdir()) == []


def test_a_temporary_that_is_not_locked_yet_is_left_alone(tmp_path: Path):
    fresh = tmp_path / f".adapter.mobizo-{os.getpid()}-0123abcd"
    fresh.touch()
    assert remove_leftovers(tmp_path / "adapter") == []
    os.utime(fresh, (time.time() - 3600, time.time() - 3600))
    assert remove_leftovers(tmp_path / "adapter") == [fresh]


def test_sigkill_in_the_midst_of_a_write_leaves_what_the_next_write_removes(session: Session, tmp_path: Path):
    code = f"""
import os, signal
from pathlib import Path
from runtime_driver.format.temporary import temporary
with temporary(Path({str(tmp_path / "adapter")!r}), directory=True) as place:
    (place / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    session.save_adapter(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# Where an adapter is to go


@pytest.mark.parametrize("place", ["adapter", "a/b/adapter", "."])
def test_proving_that_an_adapter_can_be_written_leaves_nothing(
    session: Session, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    session.check_writable(place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/deeper", "/proc/adapter", "/dev/full", "no\0name", "dangling/adapter"])
def test_places_where_no_adapter_can_be_written(session: Session, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for use in (session.check_writable, session.save_adapter):
        with pytest.raises(AdapterError):
            use(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_where_a_file_is_to_be(session: Session, tmp_path: Path):
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(AdapterError, match="is a directory"):
        session.check_writable(tmp_path)
