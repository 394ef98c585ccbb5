"""Programs, journals and adapters of version 0.1 open, go on training and replay to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from runtime_driver import Session
from runtime_driver.adapter_io import WEIGHTS_FILE, read_tensors
from tests.driver.command import Cli

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


def test_a_run_goes_on(cli: Cli, files: Path, tmp_path: Path):
    """Cut after five steps and continued by this version, on the portable kernels: the same bits as then."""
    lines = (files / "portable.jsonl").read_bytes().splitlines(keepends=True)
    (files / "portable.jsonl").write_bytes(b"".join(lines[:6]))
    arguments = ["--data", files / "train.jsonl", "--steps", 12, "--lr", 0.05, "--journal", files / "portable.jsonl"]
    done = cli("train", files / "portable.pte", *arguments, "--adapter-out", tmp_path / "a")
    assert done.code == 0, done.err
    assert_same_bits(tmp_path / "a", files / "portable.adapter")


def test_adapters_load(files: Path):
    session = Session(files / "xnnpack.pte")
    session.load_adapter(files / "xnnpack.adapter")
    assert any(not torch.equal(session.adapter[fqn], value) for fqn, value in session.initial_adapter.items())
