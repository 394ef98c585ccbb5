"""The target-independent part of a program's manifest, as plain JSON values."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ir import Ir
from .noise import VERSION

if TYPE_CHECKING:
    from .program import TrainingProgram

MOBIZO_VERSION = "0.1.0"
_STATE = ("parameter", "buffer", "state", "constant")


def describe(program: TrainingProgram, methods: Mapping[str, Ir], adapter: str) -> dict[str, Any]:
    """Return the manifest's fields that do not depend on a target (see the manifest's schema for their meaning)."""
    keys = peft_keys([*program.initial_adapter(), *program.frozen_adapter()])
    return {
        "format": "mobizo",
        "format_version": 2,
        "mobizo_version": MOBIZO_VERSION,
        "model": program.model,
        "estimator": dict(program.estimator.manifest()),
        "noise": {"kind": program.noise, "version": VERSION},
        "trainable": program.trainable,
        "adapter_state": adapter,
        "adapter": [
            *(_adapter(fqn, value, keys[fqn], True) for fqn, value in program.initial_adapter().items()),
            *(_adapter(fqn, value, keys[fqn], False) for fqn, value in program.frozen_adapter().items()),
        ],
        "peft": program.peft,
        "batch": program.labels,
        "methods": {name: _method(ir) for name, ir in methods.items()},
    }


def _adapter(fqn: str, value: Tensor, key: str, trainable: bool) -> dict[str, Any]:
    return {
        "fqn": fqn,
        "shape": list(value.shape),
        "dtype": _dtype(value),
        "trainable": trainable,
        "peft_key": key,
    }


# How PEFT's file format drops the adapter's name from an FQN.
_PEFT_KEYS = (
    (re.compile(r"\.(lora_[AB]|lora_embedding_[AB])\.[^.]+(\.weight|\.bias)?$"), r".\1\2"),
    (re.compile(r"\.lora_magnitude_vector\.[^.]+\.weight$"), ".lora_magnitude_vector"),
    (re.compile(r"\.modules_to_save\.[^.]+\."), "."),
)
_BESIDE = re.compile(r"\.(lora_[AB]\.[^.]+\.bias|lora_magnitude_vector\.[^.]+\.weight|modules_to_save\.[^.]+\..+)$")


def belongs_to_adapter(fqn: str) -> bool:
    """Return whether PEFT stores a parameter with the adapter though it is no factor of a site.

    Biases of the factors, DoRA's magnitudes, and modules saved whole.
    """
    return _BESIDE.search(fqn) is not None


def peft_key(fqn: str) -> str:
    """Return the key under which PEFT's file format stores a tensor: without the adapter's name, with its prefix."""
    for pattern, short in _PEFT_KEYS:
        fqn = pattern.sub(short, fqn)
    return fqn if fqn.startswith("base_model.model.") else f"base_model.model.{fqn}"


def peft_keys(fqns: Iterable[str]) -> dict[str, str]:
    """Return the key of every FQN; where two adapters would share one, each keeps its adapter's name."""
    names = list(fqns)
    count = Counter(map(peft_key, names))
    return {n: peft_key(n) if count[peft_key(n)] == 1 else f"base_model.model.{n}" for n in names}


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _method(ir: Ir) -> dict[str, Any]:
    inputs = [(n.meta["input"], n.meta["val"]) for n in ir.placeholders() if n.meta["input"].kind not in _STATE]
    nodes: Any = ir.graph.output_node().args[0]
    outputs = [(s, n.meta["val"]) for s, n in zip(ir.outputs, nodes, strict=True) if s.kind not in _STATE]
    return {
        "inputs": [_tensor(spec.name, spec.kind, value) for spec, value in inputs],
        "outputs": [_tensor(spec.name, spec.kind, value) for spec, value in outputs],
    }


def _tensor(name: str, role: str, value: Tensor) -> dict[str, Any]:
    return {"name": name, "dtype": _dtype(value), "shape": list(value.shape), "role": role}


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names, dtypes, shapes and bytes of tensors, in sorted order."""
    digest = hashlib.sha256()
    for fqn in sorted(state):
        value = state[fqn].detach().contiguous()
        digest.update(f"{fqn} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def peft_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the active PEFT adapter's configuration as JSON values, or None for a model without one."""
    configs: Any = getattr(model, "peft_config", None)
    active: Any = getattr(model, "active_adapter", None)
    if not isinstance(configs, dict) or active not in configs:
        return None
    fields = configs[active].to_dict()
    return json.loads(json.dumps(fields, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(getattr(value, "value", value))
