"""Failures of the command that are not about its files: usage, tracebacks, errors of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobizo_cli.main import run
from tests.driver.command import Cli

ROOT = Path(__file__).parents[2]


def test_wrong_usage_is_code_2(cli: Cli):
    done = cli("train")
    assert done.code == 2
    assert "Missing argument" in done.err


def test_debug_shows_the_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "mobizo_cli", "--debug", "inspect", "no.pte"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ProgramFileError" in done.stderr


def test_an_error_that_is_not_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    import runtime_driver.program

    def broken(path: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runtime_driver.program, "examine", broken)
    with pytest.raises(ZeroDivisionError):
        run(["inspect", "x.pte"])
