"""A program of exact gradients with AdamW, from `mobizo lower` to an adapter and a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.driver import text_model
from tests.driver.command import Cli, fails

TASK = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12", "--rank", "4")
TRAIN = ("train", "exact.pte", "--data", "rows.jsonl", "--lr", "1e-2", "--seed", "3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exact")
    text_model.save_model(directory / "model")
    text_model.save_rows(directory / "rows.jsonl", 16, 16)
    return directory


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_from_a_model_to_an_adapter(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    exact = ("--estimator", "exact", "--optimizer", "adamw", "--weight-decay", "0", "--clip-norm", "1")
    done = cli("lower", "model", *TASK, *exact, "--batch", "4", "--target", "portable", "-o", "exact.pte")
    assert done.code == 0, done.err
    described = json.loads((files / "exact.json").read_text())
    assert described["estimator"]["kind"] == "exact"
    assert described["optimizer"]["kind"] == "adamw"
    assert sorted(described["methods"]) == ["logits", "loss", "step"]

    whole = cli(*TRAIN, "--steps", "8", "--journal", "whole.jsonl", "--adapter-out", "whole")
    assert whole.code == 0, whole.err
    # Killed after five steps (here: it ends), a run takes them up again, batch by batch, and ends in the same bits.
    assert cli(*TRAIN, "--steps", "5", "--journal", "part.jsonl", "--adapter-out", "part").code == 0
    resumed = cli(*TRAIN, "--steps", "8", "--journal", "part.jsonl", "--adapter-out", "resumed")
    assert resumed.code == 0, resumed.err
    first, second, before = adapter(files / "whole"), adapter(files / "resumed"), adapter(files / "part")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in first)

    steps = [json.loads(line) for line in (files / "whole.jsonl").read_text().splitlines()[1:]]
    losses = [each["loss"] for each in steps if "loss" in each]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert cli("eval", "exact.pte", "--data", "rows.jsonl", "--adapter", "whole").code == 0


def test_what_an_exact_program_can_not_do(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    fails(cli(*TRAIN, "--steps", "2", "--eps", "1e-2", "--adapter-out", "none"), "eps")
    fails(cli("replay", "exact.pte", "--journal", "whole.jsonl", "--adapter-out", "none"), "whole.jsonl")
    fails(cli("lower", "model", *TASK, "--optimizer", "lion", "-o", "x.pte"), "--optimizer lion: expected one of sgd")
    assert not (files / "none").exists()
