"""A small language model with LoRA, and its training program written by hand: lowering tested without the passes.

`Program` keeps the contract that `lowering` relies on (core, manifest, adapters) with a step of its own: two groups,
one query, a seed-dependent perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

BATCH, LENGTH, WIDTH, HEADS, GROUPS, WORDS, RANK = 2, 8, 32, 4, 2, 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        self.norm = nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, GROUPS * head, bias=False)
        self.value = nn.Linear(WIDTH, GROUPS * head, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.lora_a = nn.Linear(WIDTH, RANK, bias=False)
        self.late = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, adapter: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm(x)
        if adapter.dim() == 2:
            delta = F.linear(self.lora_a(y), adapter)
        else:
            low = self.lora_a(y).reshape(adapter.shape[0], -1, RANK)
            delta = torch.bmm(low, adapter.transpose(1, 2)).reshape(n, t, WIDTH)
        q = (self.query(y) + delta).view(n, t, HEADS, -1).transpose(1, 2)
        k, v = (
            f(y).view(n, t, GROUPS, 1, -1).expand(n, t, GROUPS, HEADS // GROUPS, -1).reshape(n, t, HEADS, -1)
            for f in (self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, WIDTH))
        return x + self.down(F.silu(self.up(self.late(x))))


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, adapter: tuple[Tensor, ...], ids: Tensor, mask: Tensor) -> Tensor:
        t = ids.shape[1]
        seen = mask.bool()[:, None, None, :] & torch.ones(t, t, dtype=torch.bool).tril()
        x = self.table(ids)
        for block, b in zip(self.blocks, adapter, strict=True):
            x = block(x, seen, b)
        return F.linear(x, self.table.weight)


class Method(nn.Module):
    def __init__(self, model: Model, name: str) -> None:
        super().__init__()
        self.model, self.name, self.count = model, name, len(model.blocks)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        adapter, rest = args[: self.count], args[self.count :]
        return getattr(self, self.name)(adapter, *rest)

    def noise(self, seed: Tensor) -> Tensor:
        numbers = torch.bitwise_and((torch.arange(WIDTH * RANK) + seed) * 2654435761, 0xFFFF)
        return (numbers.to(torch.float32) / 65536 - 0.5).view(WIDTH, RANK)

    def each(self, adapter, ids, mask, label) -> Tensor:
        logits = self.model(adapter, ids, mask)[:, -1]
        return -torch.gather(F.log_softmax(logits, -1), 1, label[:, None])[:, 0]

    def loss(self, adapter, ids, mask, label) -> tuple[Tensor]:
        return (self.each(adapter, ids, mask, label).mean(),)

    def logits(self, adapter, ids, mask) -> tuple[Tensor]:
        return (self.model(adapter, ids, mask),)

    def apply(self, adapter, seed, lr, g) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(b - lr * g * self.noise(seed) for b in adapter)

    def step(self, adapter, ids, mask, label, seed, lr, eps) -> tuple[Tensor, ...]:
        z = self.noise(seed)
        moved = tuple(torch.stack([b + eps * z, b - eps * z]) for b in adapter)
        ids, mask, label = (x[None].expand(2, *x.shape).reshape(2 * BATCH, *x.shape[1:]) for x in (ids, mask, label))
        losses = self.each(moved, ids, mask, label).view(2, BATCH).mean(1)
        g = (losses[:1] - losses[1:]) / (2 * eps)
        return (losses.mean(), losses, g, *self.apply(adapter, seed, lr, g))


class Program:
    """Quacks like a TrainingProgram."""

    def __init__(self, layers: int = 2) -> None:
        self.model = Model(layers)
        self.exported: dict[str, ExportedProgram] = {}
        torch.manual_seed(1)
        self.adapter = {f"blocks.{i}.lora_b": torch.randn(WIDTH, RANK) * 0.1 for i in range(layers)}
        mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        mask[0, :3] = 0
        self.batch = {
            "input_ids": torch.randint(0, WORDS, (BATCH, LENGTH)),
            "attention_mask": mask,
            "label": torch.randint(0, WORDS, (BATCH,)),
        }

    def inputs(self, method: str) -> dict[str, Tensor]:
        scalars = {"seed": torch.tensor([5]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}
        gradient = {"projected_gradients": torch.tensor([0.5])}
        without_label = {k: v for k, v in self.batch.items() if k != "label"}
        chosen = {
            "step": {**self.batch, **scalars},
            "apply": {"seed": scalars["seed"], "lr": scalars["lr"], **gradient},
            "loss": self.batch,
            "logits": without_label,
        }[method]
        return {**self.adapter, **chosen}

    def expected(self, method: str) -> tuple[Tensor, ...]:
        return Method(self.model, method)(*self.inputs(method).values())

    def example_batch(self) -> dict[str, Tensor]:
        return dict(self.batch)

    def run(self, method: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec = self.method(method)
        with torch.no_grad():
            values = Method(self.model, method)(*(inputs[each["name"]] for each in spec["inputs"]))
        return {each["name"]: value for each, value in zip(spec["outputs"], values, strict=True)}

    def core(self, method: str, adapter: str = "external") -> ExportedProgram:
        """One method, exported once: `lower` leaves what it is given as it was."""
        if method not in self.exported:
            self.exported[method] = self.export(method)
        return self.exported[method]

    def export(self, method: str) -> ExportedProgram:
        """One method, exported anew."""
        with torch.no_grad():
            module = Method(self.model, method).eval()
            return torch.export.export(module, tuple(self.inputs(method).values())).run_decompositions({})

    def initial_adapter(self) -> dict[str, Tensor]:
        return dict(self.adapter)

    def frozen_adapter(self) -> dict[str, Tensor]:
        # The methods hold the model under this name.
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return {fqn: value for fqn, value in state.items() if "lora_a" in fqn}

    def weights(self) -> dict[str, Tensor]:
        """The model's matrices, without the adapter's."""
        state = self.model.state_dict()
        return {name: value for name, value in state.items() if value.dim() == 2 and "lora_a" not in name}

    def manifest(self, adapter: str = "external") -> dict[str, Any]:
        tensors = {**self.initial_adapter(), **self.frozen_adapter()}
        return {
            "format": "mobizo",
            "format_version": 1,
            "mobizo_version": "0.1.0",
            "model": {"name": "Model", "sha256": "0" * 64},
            "estimator": {"kind": "two_sided", "queries": 1, "groups": 2, "normalize": None},
            "noise": {"kind": "gaussian", "version": 1},
            "trainable": "lora_B",
            "adapter": [
                {
                    "fqn": fqn,
                    "shape": list(value.shape),
                    "dtype": "float32",
                    "trainable": fqn in self.adapter,
                    "peft_key": f"base_model.model.{fqn}",
                }
                for fqn, value in tensors.items()
            ],
            "peft": None,
            "batch": {
                "size": BATCH,
                "inputs": list(self.batch),
                "label_inputs": ["label"],
                "max_labels": None,
                "ignore_index": None,
                "shift": False,
            },
            "methods": {name: self.method(name) for name in ("step", "apply", "loss", "logits")},
        }

    def method(self, name: str) -> dict[str, Any]:
        roles = dict.fromkeys(self.adapter, "adapter") | dict.fromkeys(self.batch, "batch")
        outputs = {
            "step": ["loss", "losses", "projected_gradients", *self.adapter],
            "apply": list(self.adapter),
            "loss": ["loss"],
            "logits": ["logits"],
        }[name]
        return {
            "inputs": [tensor(key, value, roles.get(key, key)) for key, value in self.inputs(name).items()],
            "outputs": [
                tensor(key, value, roles.get(key, key)) for key, value in zip(outputs, self.expected(name), strict=True)
            ],
        }


def tensor(name: str, value: Tensor, role: str) -> dict[str, Any]:
    dtype = str(value.dtype).removeprefix("torch.")
    return {"name": name, "dtype": dtype, "shape": list(value.shape), "role": role}


class Methods:
    """A training program with some of its methods alone: each one costs seconds of compiling."""

    def __init__(self, program: Any, *names: str) -> None:
        self.program, self.names = program, names

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def manifest(self, adapter: str = "external") -> dict[str, Any]:
        described = self.program.manifest(adapter)
        methods = {name: described["methods"][name] for name in self.names}
        return {**described, "methods": methods, "evaluation": described["evaluation"] if "loss" in methods else None}


def only(program: Any, *names: str) -> Any:
    return Methods(program, *names)
