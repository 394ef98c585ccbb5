"""A real, very small training program, written by hand: no compiler of ours takes part in the driver's own tests.

logits = x @ A.T @ B.T with A frozen and B trained, sine noise, two queries: two-sided estimates, or directional
derivatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime_driver.format import Manifest
from runtime_driver.format.footer import with_footer

SIZE, FEATURES, RANK, CLASSES, QUERIES, IGNORED = 4, 6, 2, 3, 2, -100
FQN_B = "net.proj.lora_B.default.weight"
FQN_A = "net.proj.lora_A.default.weight"


def frozen_a() -> Tensor:
    return torch.randn(RANK, FEATURES, generator=torch.Generator().manual_seed(1))


def noise(seed: Tensor, query: int) -> Tensor:
    """float32[CLASSES, RANK], from nothing but the seed and the position."""
    start = torch.remainder(seed, 9973).to(torch.float32) * 12.9898 + query * 78.233
    index = torch.arange(CLASSES * RANK, dtype=torch.float32) * 4.1414
    return (torch.sin(start + index) * 1.5).reshape(CLASSES, RANK)


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Buffer(frozen_a())

    def forward(self, b: Tensor, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, self.a.t()), b.t())


class Loss(Logits):
    def forward(self, b: Tensor, x: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        scores = torch.log_softmax(super().forward(b, x), -1)
        counted = torch.ne(label, IGNORED)
        safe = torch.where(counted, label, torch.zeros_like(label))
        picked = torch.gather(scores, 1, safe.unsqueeze(1)).squeeze(1)
        return -torch.where(counted, picked, torch.zeros_like(picked)).sum() / counted.to(torch.float32).sum()


def update(b: Tensor, seed: Tensor, lr: Tensor, gradients: Tensor) -> Tensor:
    total = torch.zeros_like(b)
    for query in range(QUERIES):
        total = total + gradients[query] * noise(seed, query)
    return b - lr * total / QUERIES


class Step(Loss):
    def forward(self, b: Tensor, x: Tensor, label: Tensor, seed: Tensor, lr: Tensor, eps: Tensor):  # type: ignore[override]
        losses = []
        for query in range(QUERIES):
            z = noise(seed, query)
            losses += [
                super().forward(b + eps * z, x, label),
                super().forward(b - eps * z, x, label),
            ]
        stacked = torch.stack(losses)
        pairs = stacked.reshape(QUERIES, 2)
        gradients = (pairs[:, 0] - pairs[:, 1]) / (2 * eps)
        return stacked.mean(), stacked, gradients, update(b, seed, lr, gradients)


class Derivatives(Loss):
    """A step without an epsilon: the derivative of the loss along each z, worked out by hand."""

    def forward(self, b: Tensor, x: Tensor, label: Tensor, seed: Tensor, lr: Tensor):  # type: ignore[override]
        loss = super().forward(b, x, label)
        features = torch.matmul(x, self.a.t())
        counted = torch.ne(label, IGNORED).to(torch.float32)
        hot = torch.eq(label.unsqueeze(1), torch.arange(CLASSES)).to(torch.float32)
        residual = (torch.softmax(torch.matmul(features, b.t()), -1) - hot) * (counted / counted.sum()).unsqueeze(1)
        along = [(residual * torch.matmul(features, noise(seed, query).t())).sum() for query in range(QUERIES)]
        gradients = torch.stack(along)
        return loss, loss.reshape(1), gradients, update(b, seed, lr, gradients)


class Apply(nn.Module):
    def forward(self, b: Tensor, seed: Tensor, lr: Tensor, gradients: Tensor) -> Tensor:
        return update(b, seed, lr, gradients)


def _spec(name: str, dtype: str, shape: Sequence[int], role: str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape), "role": role}


def manifest_dict(**changes: Any) -> dict[str, Any]:
    """The tiny program's manifest as JSON values, with top-level fields replaced by ``changes``."""
    b = _spec(FQN_B, "float32", [CLASSES, RANK], "adapter")
    x, label = _spec("x", "float32", [SIZE, FEATURES], "batch"), _spec("label", "int64", [SIZE], "batch")
    seed, lr = _spec("seed", "int64", [1], "seed"), _spec("lr", "float32", [1], "lr")
    eps, loss = _spec("eps", "float32", [1], "eps"), _spec("loss", "float32", [], "loss")
    gradients = _spec("projected_gradients", "float32", [QUERIES], "projected_gradients")
    losses = _spec("losses", "float32", [2 * QUERIES], "losses")
    logits = _spec("logits", "float32", [SIZE, CLASSES], "logits")
    return {
        "format": "mobizo",
        "format_version": 2,
        "mobizo_version": "0.1.0",
        "tool_versions": {},
        "model": {"name": "Tiny", "sha256": "0" * 64},
        "target": "portable",
        "program_id": "tiny-1",
        "estimator": {"kind": "two_sided", "queries": QUERIES, "groups": 2 * QUERIES, "normalize": None},
        "noise": {"kind": "gaussian", "version": 1},
        "trainable": "lora_B",
        "adapter": [
            {
                "fqn": FQN_B,
                "shape": [CLASSES, RANK],
                "dtype": "float32",
                "trainable": True,
                "peft_key": "base_model.model.net.proj.lora_B.weight",
            },
            {
                "fqn": FQN_A,
                "shape": [RANK, FEATURES],
                "dtype": "float32",
                "trainable": False,
                "peft_key": "base_model.model.net.proj.lora_A.weight",
            },
        ],
        "peft": {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["proj"]},
        "batch": {
            "size": SIZE,
            "inputs": ["x", "label"],
            "label_inputs": ["label"],
            "max_labels": 1,
            "ignore_index": IGNORED,
            "shift": False,
        },
        "methods": {
            "step": {"inputs": [b, x, label, seed, lr, eps], "outputs": [loss, losses, gradients, b]},
            "apply": {"inputs": [b, seed, lr, gradients], "outputs": [b]},
            "loss": {"inputs": [b, x, label], "outputs": [loss]},
            "logits": {"inputs": [b, x], "outputs": [logits]},
        },
        **changes,
    }


def derivatives_dict() -> dict[str, Any]:
    """The manifest of the form that differentiates: its step has no epsilon and one loss."""
    known = manifest_dict(estimator={"kind": "forward_gradient", "queries": QUERIES, "groups": QUERIES})
    step = known["methods"]["step"]
    step["inputs"] = [each for each in step["inputs"] if each["role"] != "eps"]
    step["outputs"] = [{**each, "shape": [1]} if each["role"] == "losses" else each for each in step["outputs"]]
    return known


def build_derivatives(path: Path) -> Path:
    """The form that differentiates, at ``path``."""
    text = Manifest.from_dict(derivatives_dict()).to_json()
    path.write_bytes(with_footer(_edge(text, derivatives=True).to_executorch().buffer))
    return path


def build(
    path: Path, manifest: str | None = None, methods: Sequence[str] = ("step", "apply", "loss", "logits")
) -> Path:
    """Export and lower the tiny program to ``path``; ``manifest`` replaces the text inside."""
    path.write_bytes(with_footer(_edge(manifest, methods).to_executorch().buffer))
    return path


def build_with_weights_file(path: Path) -> Path:
    """The tiny program at ``path`` with its one weight, A, in a ``.ptd`` beside it."""
    from executorch.exir import ExecutorchBackendConfig

    # The manifest inside has the file's hash, and the file does not depend on the manifest.
    config = ExecutorchBackendConfig(external_constants=lambda node: path.stem if node.name.endswith("_a") else None)
    _edge(None).to_executorch(config).write_tensor_data_to_file(path.parent)
    data = path.with_suffix(".ptd").read_bytes()
    spec = {"file": None, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    finished = _edge(Manifest.from_dict(manifest_dict(weights_file=spec)).to_json()).to_executorch(config)
    path.write_bytes(with_footer(finished.buffer))
    return path


def _edge(
    manifest: str | None, methods: Sequence[str] = ("step", "apply", "loss", "logits"), derivatives: bool = False
) -> Any:
    from executorch.exir import to_edge

    b, x, label = torch.zeros(CLASSES, RANK), torch.zeros(SIZE, FEATURES), torch.zeros(SIZE, dtype=torch.int64)
    # lr and eps are two tensors: torch.export takes one tensor passed twice for one input.
    seed, lr, eps = torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.ones(1)
    modules: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "step": (Derivatives(), (b, x, label, seed, lr)) if derivatives else (Step(), (b, x, label, seed, lr, eps)),
        "apply": (Apply(), (b, seed, lr, torch.zeros(QUERIES))),
        "loss": (Loss(), (b, x, label)),
        "logits": (Logits(), (b, x)),
    }
    with torch.no_grad():
        programs = {name: torch.export.export(*modules[name]) for name in methods}
    text = Manifest.from_dict(manifest_dict()).to_json() if manifest is None else manifest
    constants = {"mobizo_manifest": text, "initial_adapter": (torch.zeros(CLASSES, RANK), frozen_a())}
    return to_edge(programs, constant_methods=constants)


def make_batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches whose label is a linear function of x, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    hidden = frozen_a().t() @ torch.tensor([[1.0, -1.0, 0.5], [0.5, 1.0, -1.0]])
    batches = []
    for _ in range(count):
        x = torch.randn(SIZE, FEATURES, generator=generator)
        batches.append({"x": x, "label": (x @ hidden).argmax(-1)})
    return batches
