"""Libraries that bring the runtime a backend."""

from __future__ import annotations

import _ctypes
from pathlib import Path

import pytest

import lowering
from lowering.targets import base
from runtime_driver import BackendLibraryError, load_backend_library
from tests.driver.command import Cli, fails

#: Any shared library works where it only has to load.
LIBRARY = Path(_ctypes.__file__ or "")


def test_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch):
    """The names that it registers are those that are new; here a stand-in for the runtime's list has one more."""
    from executorch.extension.pybindings import portable_lib

    assert load_backend_library(LIBRARY) == ()
    lists = [["XnnpackBackend"], ["XnnpackBackend", "VulkanBackend"]]
    monkeypatch.setattr(portable_lib, "_get_registered_backend_names", lambda: lists.pop(0))
    assert load_backend_library(LIBRARY) == ("VulkanBackend",)


def test_what_is_no_library(tmp_path: Path):
    (tmp_path / "text.so").write_text("no library")
    for path, message in (
        (tmp_path / "missing.so", "cannot be read"),
        (tmp_path, "cannot be read"),
        (Path("/dev/null"), "a device, not a regular file"),
        (tmp_path / "no\0name", "NUL"),
        (tmp_path / "text.so", "the system cannot load it"),
    ):
        with pytest.raises(BackendLibraryError, match=message):
            load_backend_library(path)


def test_the_survey_sees_a_backend_that_came_later(monkeypatch: pytest.MonkeyPatch):
    from executorch.extension.pybindings import portable_lib

    assert not lowering.available()["vulkan"].runs
    before = portable_lib._get_registered_backend_names()
    monkeypatch.setattr(portable_lib, "_get_registered_backend_names", lambda: [*before, "VulkanBackend"])
    assert lowering.available()["vulkan"].runs
    assert "VulkanBackend" in (base.registered_backends() or ())


def test_on_the_command_line(cli: Cli, pte: Path):
    Path("text.so").write_text("no library")
    for command in (
        ["targets"],
        ["export-adapter", pte, "-o", "out"],
        ["replay", pte, "--journal", "run.jsonl", "--adapter-out", "out"],
        ["eval", pte, "--data", "data.jsonl"],
        ["train", pte, "--data", "data.jsonl", "--steps", 1, "--adapter-out", "out"],
    ):
        fails(cli(*command, "--backend-library", LIBRARY, "--backend-library", "text.so"), "text.so", "cannot load it")
    assert cli("export-adapter", pte, "-o", "out", "--backend-library", LIBRARY).code == 0
