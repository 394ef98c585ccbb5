"""Fixtures of the driver's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime_driver import Session
from tests.driver import tiny


@pytest.fixture(scope="session")
def built_pte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny program, lowered once for the whole run; never change this file."""
    return tiny.build(tmp_path_factory.mktemp("tiny") / "tiny.pte")


@pytest.fixture
def pte(built_pte: Path, tmp_path: Path) -> Path:
    """A copy of the tiny program that a test may change."""
    return Path(shutil.copy(built_pte, tmp_path / "model.pte"))


@pytest.fixture
def session(built_pte: Path) -> Session:
    return Session(built_pte)
