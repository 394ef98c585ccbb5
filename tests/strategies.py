"""Random models of layers: fewer kinds than `mobizo_passes.testing.random_models` draws, and smooth ones if asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from mobizo_passes.testing.losses import PLAIN as LOSSES
from mobizo_passes.testing.models import Lora, integers, random, seeded

from .models import Attention

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}


class Layer(nn.Module):
    """One layer of a random model: optional norm, attention, LoRA and residual around a linear layer."""

    def __init__(self, fan_in: int, fan_out: int, spec: LayerSpec) -> None:
        super().__init__()
        self.norm = {"layer": nn.LayerNorm(fan_in), "rms": nn.RMSNorm(fan_in, eps=1e-5)}.get(spec.norm)
        self.attention = Attention(fan_in, 1) if spec.attention else None
        rank = spec.rank
        self.linear = Lora(fan_in, fan_out, rank, bias=spec.bias) if rank else nn.Linear(fan_in, fan_out, spec.bias)
        self.activation = ACTIVATIONS[spec.activation]
        self.residual = spec.residual and fan_in == fan_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        if self.attention is not None:
            y = self.attention(y)
        y = self.activation(self.linear(y))
        return x + y if self.residual else y


class Stack(nn.Module):
    """Random layers over [B, T, D] and a head: over all positions, or over the mean or the last of them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        widths = [spec.widths[0], *spec.widths]
        self.layers = nn.ModuleList(Layer(widths[i], widths[i + 1], s) for i, s in enumerate(spec.layers))
        self.head = Lora(widths[len(spec.layers)], spec.classes, 1) if spec.lora_head else nn.Linear(
            widths[len(spec.layers)], spec.classes
        )  # fmt: skip
        self.pooling = spec.pooling

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.pooling == "mean":
            x = x.mean(1)
        elif self.pooling == "last":
            x = x[:, -1]
        return self.head(x)


@dataclass(frozen=True)
class LayerSpec:
    rank: int  # 0: no LoRA
    bias: bool
    norm: str
    residual: bool
    attention: bool
    activation: str


@dataclass(frozen=True)
class ModelSpec:
    """Everything that a random case is made from; its text is what a failure shows."""

    widths: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    classes: int
    lora_head: bool
    pooling: str
    batch: int
    length: int
    loss: str
    weights_seed: int
    label_seed: int

    def model(self) -> nn.Module:
        return seeded(Stack(self), self.weights_seed)

    def inputs(self) -> tuple[Tensor, Tensor]:
        x = random(self.batch, self.length, self.widths[0], seed=self.weights_seed + 1)
        shape = (self.batch, self.length) if self.pooling == "none" else (self.batch,)
        if self.loss in ("mse", "sum"):
            return x, random(*shape, self.classes, seed=self.label_seed)
        labels = integers(self.classes, *shape, seed=self.label_seed)
        if self.loss == "masked":
            dropped = integers(2, *shape, seed=self.label_seed + 1).bool()
            # At least one label must stay, or the mean is 0/0.
            dropped.view(-1)[-1] = False
            labels = labels.masked_fill(dropped, -100)
        return x, labels

    def loss_fn(self) -> Any:
        return LOSSES[self.loss]


@st.composite
def models(draw: st.DrawFn, *, smooth: bool = False) -> ModelSpec:
    """Random models in which at least one layer has LoRA."""
    depth = draw(st.integers(1, 3))
    activations = sorted(set(ACTIVATIONS) - ({"relu"} if smooth else set()))
    layers = [
        LayerSpec(
            rank=draw(st.integers(0, 3)),
            bias=draw(st.booleans()),
            norm=draw(st.sampled_from(["none", "layer", "rms"])),
            residual=draw(st.booleans()),
            attention=draw(st.booleans()),
            activation=draw(st.sampled_from(activations)),
        )
        for _ in range(depth)
    ]
    lora_head = draw(st.booleans()) or not any(layer.rank for layer in layers)
    return ModelSpec(
        # Wider than every rank, so that sites are narrow.
        widths=tuple(draw(st.integers(5, 9)) for _ in range(depth)),
        layers=tuple(layers),
        classes=draw(st.integers(2, 5)),
        lora_head=lora_head,
        pooling=draw(st.sampled_from(["none", "mean", "last"])),
        batch=draw(st.integers(2, 4)),
        length=draw(st.integers(2, 5)),
        loss=draw(st.sampled_from(sorted(LOSSES))),
        weights_seed=draw(st.integers(0, 1000)),
        label_seed=draw(st.integers(0, 1000)),
    )
