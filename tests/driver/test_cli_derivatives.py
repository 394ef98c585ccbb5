"""Programs that differentiate, from `mobizo lower` to an adapter and a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.driver.command import Cli, fails

TASK = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12", "--rank", "4")
EXACT = ("--estimator", "exact", "--optimizer", "adamw", "--weight-decay", "0", "--clip-norm", "1")
FORWARD = ("--estimator", "forward-gradient", "--queries", "2")


def train(program: str) -> tuple[str, ...]:
    return ("train", f"{program}.pte", "--data", "rows.jsonl", "--lr", "1e-2", "--seed", "3")


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize(("name", "options"), [("exact", EXACT), ("forward", FORWARD)])
def test_from_a_model_to_an_adapter(
    cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: tuple[str, ...]
):
    monkeypatch.chdir(files)
    done = cli("lower", "model", *TASK, *options, "--batch", "4", "--target", "portable", "-o", f"{name}.pte")
    assert done.code == 0, done.err
    described = json.loads((files / f"{name}.json").read_text())
    assert described["estimator"]["kind"] == options[1].replace("-", "_")
    assert (described["optimizer"] or {"kind": "sgd"})["kind"] == ("adamw" if name == "exact" else "sgd")
    assert sorted(described["methods"]) == [*(["apply"] if name == "forward" else []), "logits", "loss", "step"]

    journals = [f"{name}-{run}.jsonl" for run in ("whole", "part")]
    whole, part, again = (f"{name}-{run}" for run in ("whole", "part", "resumed"))
    done = cli(*train(name), "--steps", "8", "--journal", journals[0], "--adapter-out", whole)
    assert done.code == 0, done.err
    # Killed after five steps (here: it ends), a run takes them up again, and ends in the same bits.
    assert cli(*train(name), "--steps", "5", "--journal", journals[1], "--adapter-out", part).code == 0
    resumed = cli(*train(name), "--steps", "8", "--journal", journals[1], "--adapter-out", again)
    assert resumed.code == 0, resumed.err
    first, second, before = (adapter(files / each) for each in (whole, again, part))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in first)

    steps = [json.loads(line) for line in (files / journals[0]).read_text().splitlines()[1:]]
    losses = [each["loss"] for each in steps if "loss" in each]
    assert len(losses) == 8
    # Eight steps along random directions need not go down.
    assert losses[-1] < losses[0] or name == "forward"
    assert cli("eval", f"{name}.pte", "--data", "rows.jsonl", "--adapter", whole).code == 0
    replayed = cli("replay", f"{name}.pte", "--journal", journals[0], "--adapter-out", f"{name}-replayed")
    if name == "exact":
        fails(replayed, journals[0])
        return
    assert replayed.code == 0, replayed.err
    third = adapter(files / "forward-replayed")
    assert all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", ["exact", "forward"])
def test_what_perturbs_nothing_takes_no_epsilon(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(files)
    fails(cli(*train(name), "--steps", "2", "--eps", "1e-2", "--adapter-out", "none"), "eps")
    assert not (files / "none").exists()


def test_options_that_do_not_fit(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    for options in (EXACT, FORWARD):
        done = cli("lower", "model", *TASK, *options, "--normalize", "std", "-o", "x.pte")
        fails(done, f"--normalize std: {options[1]} has no losses to normalize by")
    fails(cli("lower", "model", *TASK, "--optimizer", "lion", "-o", "x.pte"), "--optimizer lion: expected one of sgd")
