"""The short profile runs with every test run; `--long` is for a night."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driver import text_model
from tests.robustness import world as worlds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="thousands of mutations, not a few for each kind of file")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never written to by tests: each takes a copy."""
    return worlds.build(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save_model(tmp_path_factory.mktemp("robust") / "model")
