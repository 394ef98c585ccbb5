"""The `mobizo` command with weights outside of the program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.driver import text_model
from tests.driver.command import Cli, fails

LOWER = ["--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12", "--target", "portable"]
RANK = ["--rank", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save_model(tmp_path_factory.mktemp("model"))


def test_two_programs_train_on_one_weights_file(model: Path, cli: Cli, tmp_path: Path):
    rows = text_model.save_rows(tmp_path / "rows.jsonl", 12, 0)
    first = cli("lower", model, "-o", "first.pte", *LOWER, *RANK, "--queries", 2, "--external-weights")
    assert first.code == 0, first.err
    assert "first.ptd" in first.out
    options = ("--queries", 1, "--init-seed", 3, "--weights-file", "first.ptd")
    (tmp_path / "other").mkdir()
    assert cli("lower", model, "-o", "other/second.pte", *LOWER, *RANK, *options).code == 0
    written = {os.fspath(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt*")}
    assert written == {"first.pte", "first.ptd", "other/second.pte"}
    assert "first.ptd" in cli("inspect", "other/second.pte").out
    train = ("--data", rows, "--steps", 2, "--adapter-out", "adapter", "--journal", "run.jsonl")
    fails(cli("train", "other/second.pte", *train), "other/first.ptd: no such file", "--weights-file")
    assert not (tmp_path / "run.jsonl").exists()
    assert not (tmp_path / "adapter").exists()
    shared = ("--weights-file", "first.ptd")
    assert cli("train", "other/second.pte", *train, *shared).code == 0
    assert cli("eval", "other/second.pte", "--data", rows, "--adapter", "adapter", *shared).code == 0
    assert cli("train", "first.pte", "--data", rows, "--steps", 2, "--adapter-out", "adapter").code == 0
    assert cli("replay", "other/second.pte", "--journal", "run.jsonl", "--adapter-out", "replayed").code == 0


def test_what_cannot_be_is_said_before_the_model_is_loaded(cli: Cli, tmp_path: Path):
    command = ("lower", "no-such-model", "-o", "a.pte", *LOWER)
    fails(cli(*command, "--weights-file", "no.ptd"), "no.ptd cannot be read")
    fails(cli(*command, "--target", "vulkan", "--external-weights"), "'vulkan' cannot have weights outside")
    assert not list(tmp_path.iterdir())
