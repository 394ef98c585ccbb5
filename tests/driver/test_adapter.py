"""Adapters in memory and on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime_driver import AdapterError, Session
from tests.driver import tiny

PREFIX = "base_model.model.net.proj"


@pytest.fixture
def trained(session: Session) -> Session:
    session.fit(tiny.make_batches(2), 3, lr=0.5, eps=1e-2)
    return session


def test_peft_directory(trained: Session, tmp_path: Path):
    trained.save_adapter(tmp_path / "deep" / "adapter")
    assert sorted(p.name for p in tmp_path.joinpath("deep").iterdir()) == ["adapter"]
    files = {p.name for p in (tmp_path / "deep" / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    tensors = load_file(tmp_path / "deep" / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight"}
    assert torch.equal(tensors[f"{PREFIX}.lora_B.weight"], trained.adapter[tiny.FQN_B])
    assert torch.equal(tensors[f"{PREFIX}.lora_A.weight"], tiny.frozen_a())
    config = json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text())
    assert config == tiny.manifest_dict()["peft"]


def test_there_and_back(trained: Session, built_pte: Path, tmp_path: Path):
    trained.save_adapter(tmp_path / "adapter")
    other = Session(built_pte)
    other.load_adapter(tmp_path / "adapter")
    assert torch.equal(other.adapter[tiny.FQN_B], trained.adapter[tiny.FQN_B])


def test_saving_over_an_adapter_keeps_the_rest(trained: Session, tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    trained.save_adapter(tmp_path)
    trained.fit(tiny.make_batches(2), 3, lr=0.5, eps=1e-2)
    trained.save_adapter(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_model.safetensors", "adapter_config.json"}
    stored = load_file(tmp_path / "adapter_model.safetensors")[f"{PREFIX}.lora_B.weight"]
    assert torch.equal(stored, trained.adapter[tiny.FQN_B])


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_nothing_and_spoils_nothing(
    trained: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
):
    target = tmp_path / "adapter"
    if existing:
        trained.save_adapter(target)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if existing else {}
    trained.fit(tiny.make_batches(2), 3, lr=0.5, eps=1e-2)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(AdapterError, match="No space left on device"):
        trained.save_adapter(target)
    assert {p.name for p in tmp_path.iterdir()} == ({"adapter"} if existing else set())
    assert ({p.name: p.read_bytes() for p in target.iterdir()} if existing else {}) == before


def test_a_file_in_the_way(trained: Session, tmp_path: Path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(AdapterError, match="is a file"):
        trained.save_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError):
        trained.save_adapter(tmp_path / "adapter" / "deeper")
    assert (tmp_path / "adapter").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PREFIX}.lora_B.weight": None}, "is missing"),
        ({f"{PREFIX}.lora_B.weight": torch.zeros(3, 4)}, r"expected float32\[3, 2\], found float32\[3, 4\]"),
        ({f"{PREFIX}.lora_B.weight": torch.zeros(3, 2).half()}, r"found float16\[3, 2\]"),
        ({f"{PREFIX}.lora_B.weight": torch.full((3, 2), float("nan"))}, "NaN or infinity"),
        ({f"{PREFIX}.lora_A.weight": torch.zeros(2, 6)}, "differs from the frozen tensor"),
        ({"base_model.model.other.lora_B.weight": torch.zeros(3, 2)}, "is not part of the program"),
    ],
)
def test_unfit_directories(trained: Session, tmp_path: Path, change: dict, message: str):
    trained.save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: value for key, value in {**load_file(path), **change}.items() if value is not None}
    save_file(tensors, path)
    before = trained.adapter
    with pytest.raises(AdapterError, match=message):
        trained.load_adapter(tmp_path)
    assert torch.equal(trained.adapter[tiny.FQN_B], before[tiny.FQN_B])


def test_unreadable_directories(trained: Session, tmp_path: Path):
    with pytest.raises(AdapterError, match="no such directory"):
        trained.load_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        trained.load_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        trained.load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "is missing"),
        ({tiny.FQN_B: torch.zeros(2, 3)}, "expected float32"),
        ({tiny.FQN_B: torch.zeros(3, 2), "z": torch.zeros(1)}, "`z` is not one of"),
        ({tiny.FQN_B: torch.full((3, 2), float("inf"))}, "infinity"),
        ({tiny.FQN_B: torch.zeros(3, 2), tiny.FQN_A: tiny.frozen_a()}, "is not one of"),
    ],
)
def test_assignment_is_checked(session: Session, value: dict, message: str):
    with pytest.raises(AdapterError, match=message):
        session.adapter = value
    assert torch.equal(session.adapter[tiny.FQN_B], torch.zeros(3, 2))


def test_the_session_shares_no_memory(session: Session):
    mine = torch.ones(3, 2)
    session.adapter = {tiny.FQN_B: mine}
    mine.zero_()
    session.adapter[tiny.FQN_B].zero_()
    assert torch.equal(session.adapter[tiny.FQN_B], torch.ones(3, 2))
    session.initial_adapter[tiny.FQN_B].fill_(7)
    assert torch.equal(session.initial_adapter[tiny.FQN_B], torch.zeros(3, 2))


def test_the_driver_needs_no_compiler(built_pte: Path, tmp_path: Path):
    """A device has the driver and the runtime alone; the modules of the others must not even be looked for."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"mobizo_passes", "lowering", "mobizo_cli", "transformers", "peft"}}:
            raise RuntimeError(f"the driver imports {{name}}")
sys.meta_path.insert(0, Refuse())
from runtime_driver import Session
from tests.driver import tiny
session = Session({str(built_pte)!r})
session.fit(tiny.make_batches(2), 2, lr=0.1, eps=0.1, journal={str(tmp_path / "run.jsonl")!r})
session.evaluate(tiny.make_batches(2), label_ids=[0, 1, 2])
session.save_adapter({str(tmp_path / "adapter")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
