"""A model around one operator: LoRA in front of it, a head behind it; for the tests of batching rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import BATCH, LENGTH, Lora, cross_entropy, integers, random, seeded

WIDTH = 8
Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """LoRA, then `body` on perturbed [B, T, 8] values, then a mean over positions and a frozen head."""

    def __init__(self, body: Body, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = Lora(6, WIDTH)
        self.extra = extra
        self.body = body
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.layer(x))
        y = y if self.extra is None else self.extra(y)
        return self.head(y.flatten(2).mean(1) if y.dim() > 2 else y)


def build(body: Body, extra: nn.Module | None = None) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    model = Around(body, extra)
    inputs = (random(BATCH, LENGTH, 6), integers(4, BATCH))
    with torch.no_grad():
        model.eval()(inputs[0])
    return seeded(model), inputs


def compile_and_verify(body: Body, extra: nn.Module | None = None, **options: Any) -> mz.TrainingProgram:
    model, inputs = build(body, extra)
    program = mz.transform(model, inputs, **{"loss": cross_entropy, "estimator": mz.TwoSided(2), **options})
    mz.verify(program, model, inputs)
    return program


ROWS = torch.tensor([2, 0, 1])
# Made once, before the export: a model that draws numbers is refused.
fixed, fixed_integers = functools.cache(random), functools.cache(integers)
M = random(WIDTH, WIDTH, seed=21)
V = random(WIDTH, seed=22)


def written(x: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """Write into a copy of `x` in place; export turns that into a functional operator."""
    y = x.clone()
    write(y)
    return y
