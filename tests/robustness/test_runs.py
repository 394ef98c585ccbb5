"""Runs of the command that are killed, that overflow, or that could not keep their result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.robustness.world import Ended, run

ROOT = Path(__file__).parents[2]
TRAIN = ("train", "model.pte", "--data", "train.jsonl", "--adapter-out", "out")


@pytest.fixture
def root(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world"))


def test_a_kill_before_any_write_costs_nothing(world: Path, request: pytest.FixtureRequest):
    """Killed before its N-th write to disk and run again: the same bits, the same files, nothing left over."""
    points = range(1, 60, 1 if request.config.getoption("--long", default=False) else 9)
    command = [sys.executable, "-m", "tests.robustness.kill_points", str(world), "0", *map(str, points)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, *others = map(json.loads, done.stdout.splitlines())
    assert whole["code"] == 0
    assert whole["adapter"] is not None
    assert sum(other["killed"] for other in others) > len(others) / 2
    for other in others:
        assert (other["code"], other["fault"]) == (0, None), other
        assert other["adapter"] == whole["adapter"], other
        assert other["files"] == whole["files"], other


def weights(ended: Ended) -> dict[str, torch.Tensor]:
    assert ended.adapter is not None
    return load(ended.adapter)


def one_line(ended: Ended) -> str:
    assert ended.code == 1
    assert ended.said.count("\n") == 1
    return ended.said


def test_a_run_that_overflows_keeps_the_last_adapter_with_a_finite_loss(root: Path):
    lr = "3e38"
    ended = run(root, (*TRAIN, "--steps", "6", "--lr", lr, "--journal", "new.jsonl"))
    said = one_line(ended)
    assert said.startswith("mobizo: error: The last adapter with a finite loss, that after ")
    steps = int(said.split("that after ")[1].split()[0])
    kept = weights(ended)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())
    if steps == 0:
        assert run(root, ("export-adapter", "model.pte", "-o", "out")).adapter == ended.adapter
    else:
        again = run(root, (*TRAIN, "--steps", str(steps), "--lr", lr))
        assert again.adapter == ended.adapter
    # Not finite with the next one, or the next one is not finite; and no resume leads around it.
    second = run(root, (*TRAIN, "--steps", "6", "--lr", lr, "--journal", "new.jsonl"))
    assert one_line(second) == said
    assert second.adapter == ended.adapter
    assert "new.jsonl would stop at the same step again" in said


@pytest.mark.parametrize("place", ["train.jsonl", "train.jsonl/out", "/proc/out", "/dev/full"])
def test_a_place_that_cannot_take_the_adapter_is_found_first(root: Path, place: str):
    before = sorted(path.name for path in root.iterdir())
    ended = run(root, (*TRAIN[:-1], place, "--steps", "2", "--journal", "new.jsonl"))
    assert place.split("/")[-1] in one_line(ended)
    assert sorted(path.name for path in root.iterdir()) == before


def test_proving_the_place_leaves_nothing_of_a_run_that_fails_at_once(root: Path):
    before = sorted(str(path) for path in root.rglob("*"))
    ended = run(root, (*TRAIN, "--steps", "2", "--eps", "0"))
    assert "`eps` must be" in one_line(ended)
    assert sorted(str(path) for path in root.rglob("*")) == before


@pytest.mark.parametrize("journal", ["/dev/full", "pipe", "."])
def test_a_journal_that_is_no_file_is_refused_at_once(root: Path, journal: str):
    os.mkfifo(root / "pipe")
    for command in (
        (*TRAIN, "--steps", "2", "--journal", journal),
        ("replay", "model.pte", "--journal", journal, "--adapter-out", "out"),
    ):
        assert "cannot" in one_line(run(root, command))
