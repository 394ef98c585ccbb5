"""Which delegates a program needs: from its manifest, or in older files from the methods themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from runtime_driver import ProgramFileError, Session
from runtime_driver.container import delegates_of
from tests.driver import tiny
from tests.driver.test_old_files import FILES


def test_older_programs_name_them_in_their_methods():
    assert delegates_of(FILES / "xnnpack.pte") == {"XnnpackBackend"}
    assert delegates_of(FILES / "portable.pte") == frozenset()


def test_a_program_written_by_the_runtime_s_own_tools_is_read(built_pte: Path):
    assert delegates_of(built_pte) == frozenset()


class NoBackends:
    registered_backend_names = ("OtherBackend",)


def refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message of a session whose runtime refuses every method, and has `OtherBackend` alone."""
    from executorch.runtime import Program, Runtime

    session = Session(path)

    def load_method(program: Program, name: str) -> None:
        raise RuntimeError("error 0x20")

    monkeypatch.setattr(Program, "load_method", load_method)
    monkeypatch.setattr(Runtime.get(), "backend_registry", NoBackends())
    with pytest.raises(ProgramFileError) as caught:
        session.program.execute("step", [torch.zeros(1)])
    return str(caught.value)


def test_the_backend_of_an_older_program_is_named(monkeypatch: pytest.MonkeyPatch):
    message = refused(FILES / "xnnpack.pte", monkeypatch)
    assert "lowered for target `xnnpack`, which needs the runtime's XnnpackBackend; this runtime has" in message


def test_the_backend_in_the_manifest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    manifest = json.dumps(tiny.manifest_dict(target="mine", backend="MyBackend"))
    path = tiny.build(tmp_path / "model.pte", manifest=manifest)
    assert "for target `mine`, which needs the runtime's MyBackend; this runtime has" in refused(path, monkeypatch)


def test_without_a_backend_the_runtime_s_own_reason_is_told(built_pte: Path, monkeypatch: pytest.MonkeyPatch):
    assert "cannot load method `step` (error 0x20)" in refused(built_pte, monkeypatch)
