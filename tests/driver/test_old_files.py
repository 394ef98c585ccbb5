"""Programs, journals and adapters of version 0.1 open, go on training and replay to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime_driver import Session, read_journal
from runtime_driver.adapter_io import WEIGHTS_FILE, read_tensors
from tests.driver.command import Cli, Done

FILES = Path(__file__).parents[1] / "fixtures" / "v0_1"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FILES, tmp_path / "v0_1"))


def assert_same_bits(found: Path, expected: Path) -> None:
    ours, theirs = read_tensors(found / WEIGHTS_FILE)[0], read_tensors(expected / WEIGHTS_FILE)[0]
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].view(torch.int32), tensor.view(torch.int32)), key


@pytest.mark.parametrize(
    ("program", "run"), [("portable", "portable"), ("xnnpack", "xnnpack"), ("portable", "continued")]
)
def test_journals_replay(cli: Cli, files: Path, tmp_path: Path, program: str, run: str):
    done = cli("replay", files / f"{program}.pte", "--journal", files / f"{run}.jsonl", "--adapter-out", tmp_path / "a")
    assert done.code == 0, done.err
    assert_same_bits(tmp_path / "a", files / f"{run}.adapter")
    assert_said_once(done)


def test_a_run_goes_on(cli: Cli, files: Path, tmp_path: Path):
    """Cut after five steps and continued by this version, on the portable kernels: the same bits as then."""
    lines = (files / "portable.jsonl").read_bytes().splitlines(keepends=True)
    (files / "portable.jsonl").write_bytes(b"".join(lines[:6]))
    arguments = ["--data", files / "train.jsonl", "--steps", 12, "--lr", 0.05, "--journal", files / "portable.jsonl"]
    done = cli("train", files / "portable.pte", *arguments, "--adapter-out", tmp_path / "a")
    assert done.code == 0, done.err
    assert_same_bits(tmp_path / "a", files / "portable.adapter")
    assert_said_once(done)
    # Its lines stay those of version 1, all of them.
    assert (files / "portable.jsonl").read_bytes() == (FILES / "portable.jsonl").read_bytes()


def assert_said_once(done: Done) -> None:
    """What a program and a journal of format 1 cannot prove: a line for each."""
    said = [line for line in done.err.splitlines() if line.startswith("mobizo: ")]
    assert len(said) == len(set(said))
    unproven = "written in format 1, which has no hash of the program", "a journal of format 1, whose lines are not"
    for words in unproven:
        assert sum(words in line and "warning: " in line for line in said) == 1, said


@pytest.mark.filterwarnings("ignore::runtime_driver.UnprovenWarning")
def test_an_old_snapshot_is_replayed_around(cli: Cli, files: Path, tmp_path: Path):
    """It has no hash of its tensors, so nothing proves them: here they are wrong."""
    record = read_journal(files / "portable.jsonl").records[7]
    header = read_journal(files / "portable.jsonl").header
    session = Session(files / "portable.pte")
    metadata = {"initial_adapter": header.initial_adapter, "program_id": header.program_id, "record": repr(record)}
    snapshot = files / "portable.jsonl.snapshot.safetensors"
    save_file({fqn: tensor + 1 for fqn, tensor in session.initial_adapter.items()}, snapshot, metadata)
    done = cli("replay", files / "portable.pte", "--journal", files / "portable.jsonl", "--adapter-out", tmp_path / "a")
    assert done.code == 0, done.err
    assert_same_bits(tmp_path / "a", files / "portable.adapter")
    assert "mobizo: warning: Snapshot ignored, replaying from the first step." in done.err
    assert "written by an earlier release, without a hash of its tensors" in done.err


@pytest.mark.filterwarnings("ignore::runtime_driver.UnprovenWarning")
def test_adapters_load(files: Path):
    session = Session(files / "xnnpack.pte")
    session.load_adapter(files / "xnnpack.adapter")
    assert any(not torch.equal(session.adapter[fqn], value) for fqn, value in session.initial_adapter.items())
