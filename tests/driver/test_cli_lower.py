"""`mobizo lower`: what the options of targets become, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowering
from lowering.targets import get_target
from tests.driver import text_model
from tests.driver.command import Cli, fails

TASK = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12")
INTEGERS = ("--target", "qnn", "--precision", "16a8w")


class Stopped(lowering.LoweringError):
    """Raised in the place of lowering."""


def test_options_of_other_targets_are_refused_before_anything_is_loaded(cli: Cli):
    task = ("--template", "{text} It was", "--labels", "0= bad,1= good", "-o", "x.pte")
    fails(cli("lower", "nothing", *task, "--precision", "fp16"), "'xnnpack' has no option 'precision'")
    fails(cli("lower", "nothing", *task, "--target", "vulkan", "--precision", "int8"), "expected one of fp32, fp16")


def test_ranges_are_asked_for_before_anything_is_loaded(cli: Cli, tmp_path: Path):
    data = text_model.save_rows(tmp_path / "rows.jsonl", 2, 2)
    fails(cli("lower", "nothing", *TASK, "-o", "x.pte", *INTEGERS), "--precision 16a8w needs --calibrate FILE")
    fails(cli("lower", "nothing", *TASK, "-o", "x.pte", "--calibrate", data), "not quantised; leave it out")
    done = cli("lower", "nothing", *TASK, "-o", "x.pte", *INTEGERS, "--calibrate", "missing.csv")
    assert done.code != 0
    assert "missing.csv" in done.err


def test_examples_become_the_batches_that_ranges_are_measured_on(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = text_model.save_model(tmp_path / "model")
    data = text_model.save_rows(tmp_path / "rows.jsonl", 6, 6)
    seen: dict[str, Any] = {}

    def lower(program: Any, **arguments: Any) -> None:
        seen.update(arguments, inputs=program.manifest()["batch"]["inputs"])
        raise Stopped("seen")

    monkeypatch.setattr(lowering, "lower", lower)
    monkeypatch.setattr(type(get_target("qnn")), "require", lambda self: None)
    ranges = ("--calibrate", data, "--calibration-batches", 3)
    fails(cli("lower", model, *TASK, "--rank", 4, "--batch", 2, "-o", "x.pte", *INTEGERS, *ranges), "seen")
    assert seen["precision"] == "16a8w"
    assert len(seen["calibration"]) == 3
    for batch in seen["calibration"]:
        assert sorted(batch) == sorted(seen["inputs"])
        assert all(len(value) == 2 for value in batch.values())
    assert list(tmp_path.glob("x*")) == []
