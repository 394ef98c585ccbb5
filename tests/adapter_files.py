"""What PEFT saves against what we save, for one model, without lowering it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mobizo_passes.sites import peft as peft_files
from runtime_driver import adapter_io
from runtime_driver.format import AdapterFile

#: How PEFT's tuners call what we train; others of theirs have no factor of the kind, and are kept as they are.
UP = ("lora_B", "lora_embedding_B")


def save_both(model: Any, saver: Any, directory: Path, trained: list[str] | None = None) -> None:
    """Train every up-matrix (or `trained`) in name only, and save: PEFT to `peft`, from the model; we to `ours`."""
    weights = {name: p for name, p in model.named_parameters() if p.dtype is torch.float32}
    ups = [name for name in weights if any(up in name.split(".") for up in UP) and not name.endswith("bias")]
    trained = ups if trained is None else trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    configs = {name: dict(vars(config)) for name, config in saver.peft_config.items()}
    asked = peft_files.adapter_files(model, trained, [])
    tensors = {name: value.clone() for name, value in peft_files.tensors_of(model, asked).items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: dict(vars(config)) for name, config in saver.peft_config.items()} == configs
    generator = torch.Generator().manual_seed(3)
    for name in trained:
        tensors[name] = torch.randn(weights[name].shape, generator=generator) * 0.3
        with torch.no_grad():
            weights[name].copy_(tensors[name])
    files = [AdapterFile.model_validate(peft_files.describe(file)) for file in asked]
    adapter_io.save_adapter(directory / "ours", files, tensors)
    saver.save_pretrained(str(directory / "peft"))


def assert_same_files(directory: Path) -> int:
    """The same directories with the same configurations, keys, shapes, dtypes and values; returns the keys' number."""
    ours, theirs = (_tree(directory / name) for name in ("ours", "peft"))
    assert ours == theirs
    count = 0
    for name in ours:
        mine, other = directory / "ours" / name, directory / "peft" / name
        if name.endswith(".json"):
            assert json.loads(mine.read_text()) == json.loads(other.read_text())
            continue
        found, expected = load_file(mine), load_file(other)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype is value.dtype, key
            assert torch.equal(found[key], value), key
        count += len(expected)
    return count


def _tree(directory: Path) -> set[str]:
    """Weights and configurations, by their paths; PEFT writes a model card too."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("adapter_*"))
    return set(found)


@contextmanager
def no_key_astray() -> Iterator[None]:
    """PEFT warns of keys that are missing from a file or that it does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        yield


def loaded(base: nn.Module, directory: Path, active: list[str]) -> Any:
    """PEFT's model of a base and all adapters of a directory."""
    import peft

    names = sorted({path.parent for path in directory.rglob("adapter_config.json")})
    model: Any = None
    with no_key_astray():
        for path in names:
            name = "default" if path == directory else path.relative_to(directory).as_posix()
            if model is None:
                model = peft.PeftModel.from_pretrained(base, str(path), adapter_name=name)
            else:
                model.load_adapter(str(path), adapter_name=name)
    if not model.active_peft_config.is_prompt_learning:
        model.base_model.set_adapter(active)
    return model.eval()


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Logits, for a row's inputs with their labels."""
    with torch.no_grad():
        out: Any = model(**inputs) if isinstance(inputs, dict) else model(inputs[0])
    return out if isinstance(out, Tensor) else out.logits
