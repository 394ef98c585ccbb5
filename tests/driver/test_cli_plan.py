"""`mobizo plan`, and `lower --estimator auto`, which chooses in the same way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowering.footprint import Footprint
from mobizo_cli import planning
from mobizo_cli.errors import OptionError
from tests.driver.command import Cli, fails

TASK = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12", "--rank", "4")
PORTABLE = ("--target", "portable")


def test_a_plan_says_what_each_takes_and_which_to_choose(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    two = ("--estimators", "two-sided,exact", "--optimizer", "adamw", "--data", "rows.jsonl")
    done = cli("plan", "model", *TASK, *two, *PORTABLE, "--layers", "0-1", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    exact, held, two_sided = told["candidates"]
    assert [each["estimator"] for each in told["candidates"]] == ["exact", "exact", "two-sided"]
    assert [each["checkpoint"] for each in told["candidates"]] == [None, "layer", None]
    # With checkpoints a layer's forward is computed twice.
    assert held["flops"] > exact["flops"]
    assert told["chosen"] == 0
    # Rank 4, two layers: lora_B of q_proj is [32, 4], of v_proj [16, 4], in float32; AdamW has two moments.
    assert exact["adapter_bytes"] == two_sided["adapter_bytes"] == 2 * 4 * 4 * (32 + 16)
    assert exact["optimizer_bytes"] == two_sided["optimizer_bytes"] >= 2 * exact["adapter_bytes"]
    # Eight perturbed forwards cost more than one forward and a backward.
    assert two_sided["flops"] > exact["flops"] > 0
    # The model's weights, and with noise its table.
    assert exact["weight_bytes"] < two_sided["weight_bytes"] < exact["weight_bytes"] + 2**18
    for each in told["candidates"]:
        assert each["packed_bytes"] == 0
        assert each["peak_bytes"] > each["weight_bytes"] + each["arena_bytes"] > each["weight_bytes"]
        # The process that ran it holds Python and PyTorch too.
        assert each["measured_peak_bytes"] > each["peak_bytes"]
        assert each["seconds"] > 0


def test_auto_takes_the_first_that_fits_and_says_why(cli: Cli, files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(files)
    auto = ("lower", "model", *TASK, *PORTABLE, "--no-check", "--estimator", "auto")
    done = cli(*auto, "--max-memory", "2GiB", "-o", "auto.pte", "--measure", "rows.jsonl")
    assert done.code == 0, done.err
    assert json.loads((files / "auto.json").read_text())["estimator"]["kind"] == "exact"
    assert "exact learns most in its time and fits into 2,048.0 MiB" in done.out
    assert "beside float32  losses off by " in done.out
    assert "100% of their signs agree (2 batches)" in done.out
    fails(cli(*auto, "--max-memory", "much", "-o", "x.pte"), "--max-memory much: expected a number")
    fails(cli(*auto, "--normalize", "std", "-o", "x.pte"), "--normalize std")
    fails(cli(*auto, "--checkpoint", "layer", "-o", "x.pte"), "--checkpoint layer")
    named = ("lower", "model", *TASK, *PORTABLE, "-o", "x.pte", "--checkpoint")
    fails(cli(*named, "layer"), "--checkpoint layer: two-sided")
    fails(cli(*named, "block", "--estimator", "exact"), "--checkpoint block: checkpoint must be None or 'layer'")
    fails(cli("lower", "model", *TASK, "--max-memory", "1GiB", "-o", "x.pte"), "--estimator auto")
    fails(cli("plan", "model", *TASK, "--estimators", "guess"), "--estimators guess: expected some of exact")
    assert not (files / "x.pte").exists()


def planned(name: str, layers: str | None = None, peak: int | None = None, refused: str = "") -> planning.Planned:
    taken = None if peak is None else Footprint(0, peak, 0, 0, 0, 0, 0, 0)
    return planning.Planned(planning.Candidate(name, layers), taken, refused)


def test_the_choice_is_the_first_within_the_memory_and_the_reason_names_those_before():
    rows = [
        planned("exact", refused="no derivative of sort"),
        planned("forward-gradient", peak=300 * 2**20),
        planned("forward-gradient", "1-1", peak=200 * 2**20),
        planned("two-sided", peak=100 * 2**20),
    ]
    assert planning.choose(rows, None) is rows[1]
    chosen = planning.choose(rows, 250 * 2**20)
    assert chosen is not None
    assert chosen is rows[2]
    assert planning.reason(chosen, rows, 250 * 2**20) == (
        "forward-gradient on layers 1-1 learns most in its time and fits into 250.0 MiB; exact is refused, "
        "forward-gradient needs 300.0 MiB"
    )
    assert planning.choose(rows, 50 * 2**20) is None
    message = planning.nothing_fits(rows, 50 * 2**20)
    assert "exact no derivative of sort; forward-gradient 300.0 MiB" in message
    assert "--max-memory 50.0 MiB" in message


@pytest.mark.parametrize(("text", "size"), [("800MiB", 800 * 2**20), ("1.5 GiB", 3 * 2**29), ("2e9", 2 * 10**9)])
def test_sizes(text: str, size: int):
    assert planning.parse_bytes("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "1 gigabyte", "nan", "1e999"])
def test_what_is_no_size(text: str):
    with pytest.raises(OptionError, match="--max-memory"):
        planning.parse_bytes("--max-memory", text)
