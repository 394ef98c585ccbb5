"""The target-independent part of a program's manifest, as plain JSON values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.noise import VERSION
from mobizo_passes.sites import peft as peft_files
from mobizo_passes.sites.peft import AdapterFile

MOBIZO_VERSION = "0.1.0"
_STATE = ("parameter", "buffer", "state", "constant")


def describe(
    *,
    model: Mapping[str, Any],
    estimator: Mapping[str, object],
    optimizer: Mapping[str, object] | None,
    noise: str,
    trainable: str,
    adapter: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    files: Sequence[AdapterFile],
    labels: Mapping[str, Any],
    methods: Mapping[str, Ir],
    form: str,
) -> dict[str, Any]:
    """Return the manifest's fields that do not depend on a target (see the manifest's schema for their meaning).

    `adapter` and `frozen`: the tensors that are trained, and those that are saved with them; `form`: where the step
    has its adapter, "external" or "internal".
    """
    combination = methods["loss"].combination
    return {
        "format": "mobizo",
        "format_version": 2,
        "mobizo_version": MOBIZO_VERSION,
        "model": dict(model),
        "estimator": dict(estimator),
        "optimizer": None if optimizer is None else dict(optimizer),
        "noise": {"kind": noise, "version": VERSION},
        "trainable": trainable,
        "adapter_state": form,
        "adapter": [
            *(_adapter(fqn, value, True) for fqn, value in adapter.items()),
            *(_adapter(fqn, value, False) for fqn, value in frozen.items()),
        ],
        "adapter_files": [peft_files.describe(each) for each in files],
        "batch": dict(labels),
        "evaluation": None if combination is None else combination.manifest(),
        "methods": {name: _method(ir) for name, ir in methods.items()},
    }


def _adapter(fqn: str, value: Tensor, trainable: bool) -> dict[str, Any]:
    return {
        "fqn": fqn,
        "shape": list(value.shape),
        "dtype": _dtype(value),
        "trainable": trainable,
    }


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _method(ir: Ir) -> dict[str, Any]:
    inputs = [(role(n), n.meta["val"]) for n in ir.placeholders() if role(n).kind not in _STATE]
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
