"""Fixtures of the driver's tests."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mobizo_cli.main import run
from runtime_driver import Session
from tests.driver import text_model, tiny
from tests.driver.command import Cli, Done


@pytest.fixture(scope="session")
def built_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny program, lowered once for the whole run; never change this file."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "tiny.pte")


@dataclass(frozen=True)
class Either:
    """A tiny program, whichever way it comes by its projected gradients, and how it is trained."""

    path: Path
    run: dict[str, Any]

    def session(self) -> Session:
        return Session(self.path)


@pytest.fixture(scope="session", params=["differences", "derivatives"])
def either(request: pytest.FixtureRequest, built_pte: Path, tmp_path_factory: pytest.TempPathFactory) -> Either:
    if request.param == "differences":
        return Either(built_pte, {"lr": 0.5, "eps": 1e-2, "seed": 7})
    path = tiny.build_derivatives(tmp_path_factory.mktemp("derivatives") / "tiny.pte")
    return Either(path, {"lr": 0.5, "seed": 7})


@pytest.fixture
def pte(built_pte: Path, tmp_path: Path) -> Path:
    """A copy of the tiny program that a test may change."""
    return Path(shutil.copy(built_pte, tmp_path / "model.pte"))


@pytest.fixture(scope="session")
def built_with_weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny program with its weight in a file of its own; never change either file."""
    return tiny.build_with_weights_file(tmp_path_factory.mktemp("weights") / "tiny.pte")


@pytest.fixture
def pte_with_weights_file(built_with_weights_file: Path, tmp_path: Path) -> Path:
    """A copy of that program and of its weights file, which a test may change."""
    shutil.copy(built_with_weights_file.with_suffix(".ptd"), tmp_path / "model.ptd")
    return Path(shutil.copy(built_with_weights_file, tmp_path / "model.pte"))


@pytest.fixture
def session(built_pte: Path) -> Session:
    return Session(built_pte)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and rows to train on."""
    directory = tmp_path_factory.mktemp("files")
    text_model.save_model(directory / "model")
    text_model.save_rows(directory / "rows.jsonl", 16, 16)
    return directory


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cli]:
    """Run the command in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Done:
        capfd.readouterr()  # what fixtures wrote
        with pytest.raises(SystemExit) as caught:
            run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Done(int(caught.value.code or 0), out, err)

    with warnings.catch_warnings():
        yield call
    logging.disable(logging.NOTSET)
