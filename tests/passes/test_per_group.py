"""Trainable tensors used otherwise than in a product with the batch: every rule against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import BATCH, LENGTH, Lora, integers, random, seeded

WIDTH = 8
Body = Callable[[Tensor, Tensor], Tensor]


class Uses(nn.Module):
    """A LoRA layer [6 -> 8], rank 2; `body` reads its output and its trainable lora_B [8, 2] once more."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layer, self.head = Lora(6, WIDTH), nn.Linear(WIDTH, 4)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.layer(x), self.layer.lora_B.weight)
        return self.head(y.flatten(2).mean(1) if y.dim() > 2 else y)


def conv(y: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """Convolve [B, T, D] over T."""
    return F.conv1d(y.transpose(1, 2), weight, **options).transpose(1, 2)


FINE: dict[str, Body] = {
    "penalty": lambda y, b: y + b.square().sum(),
    "norm of a product": lambda y, b: y / (1 + torch.linalg.vector_norm(b @ b.T, dim=1)),
    "linear with a computed weight": lambda y, b: F.linear(y, torch.tanh(b @ b.T)),
    "linear with a perturbed bias": lambda y, b: F.linear(y, torch.ones(WIDTH, WIDTH), b[:, 0]),
    "linear with both": lambda y, b: F.linear(y, b @ b.T, b[:, 1]),
    "matmul": lambda y, b: y @ b @ b.T,
    "matmul with a vector": lambda y, b: (y @ b[:, 0]).unsqueeze(-1) + y,
    "matmul from the left": lambda y, b: ((b @ b.T) @ y.transpose(1, 2)).transpose(1, 2),
    "bmm with one matrix": lambda y, b: torch.bmm(y.reshape(1, -1, WIDTH), (b @ b.T).unsqueeze(0)).reshape(y.shape),
    "matmul with one matrix per head": lambda y, b: (
        y.reshape(BATCH, LENGTH, 2, 4).transpose(1, 2) @ (b @ b.T).reshape(2, 4, WIDTH)
    ).mean(1),
    "addmm": lambda y, b: torch.addmm(b[:, 0], y.reshape(-1, WIDTH), b @ b.T).reshape(y.shape),
    "baddbmm": lambda y, b: torch.baddbmm(y, y, (b @ b.T).expand(BATCH, WIDTH, WIDTH)),
    "einsum": lambda y, b: torch.einsum("btd,dr,er->bte", y, b, b),
    "scaled by a row": lambda y, b: y * b[:, 0],
    "scaled by a column of positions": lambda y, b: y * b[:LENGTH, :1],
    "shared batch scaled by a row": lambda y, b: y + torch.ones_like(y) * b[:, 1],
    "gated": lambda y, b: torch.where(y > b[:, 0], y, b[:, 1]),
    "concatenated": lambda y, b: torch.cat([y, b[:, 0].expand(BATCH, 1, WIDTH)], 1),
    "concatenated with three batches": lambda y, b: torch.stack(
        torch.cat([b[:, 0].expand(3 * BATCH, 1, WIDTH), torch.cat([y, y.tanh(), y.sin()])], 1).chunk(3)
    ).sum(0),
    "layer norm": lambda y, b: F.layer_norm(y, [WIDTH], 1 + b[:, 0], b[:, 1]),
    "group norm": lambda y, b: F.group_norm(y.transpose(1, 2), 2, 1 + b[:, 0], b[:, 1]).transpose(1, 2),
    "batch norm": lambda y, b: (
        F.batch_norm(y.transpose(1, 2), torch.zeros(WIDTH), torch.ones(WIDTH), 1 + b[:, 0]).transpose(1, 2)
    ),
    "convolution": lambda y, b: conv(y, (b @ b.T).unsqueeze(2), padding=1)[:, :LENGTH],
    "strided convolution": lambda y, b: conv(y, b.reshape(2, WIDTH, 1), stride=2).repeat(1, 1, 4),
    "grouped convolution": lambda y, b: conv(y, b.reshape(8, 1, 2), groups=8),
    "convolution with a bias": lambda y, b: conv(y, b.reshape(8, 1, 2), bias=b[:, 0], groups=8),
    "padded convolution": lambda y, b: conv(y, b.reshape(16, 1, 1)[:8], padding="same", groups=8),
    "look-up by the batch": lambda y, b: y + F.embedding(torch.argmax(y.detach(), -1), torch.cat([b, b, b, b], 1)),
    "several results": lambda y, b: y * torch.max(b, 1).values + torch.sort(b[:, 0]).values,
    "folded batch": lambda y, b: (y.reshape(-1, WIDTH) * b[:, 0]).reshape(y.shape),
    "transposed batch": lambda y, b: (y.permute(1, 2, 0) * b[:, :1]).permute(2, 0, 1),
    "attention over weights": lambda y, b: F.scaled_dot_product_attention(
        y, (b @ b.T).expand(BATCH, 8, 8), (b @ b.T).expand(BATCH, 8, 8)
    ),
}  # fmt: skip


def verified(body: Body, **options: Any) -> mz.TrainingProgram:
    model, inputs = seeded(Uses(body)), (random(BATCH, LENGTH, 6), integers(4, BATCH))
    program = mz.transform(model, inputs, loss=F.cross_entropy, estimator=mz.TwoSided(2), **options)
    mz.verify(program, model, inputs)
    return program


@pytest.mark.parametrize("name", FINE)
def test_agrees_with_the_reference(name: str) -> None:
    program = verified(FINE[name])
    # What lowering gets computes the same, and holds no operator of ours.
    assert "mobizo" not in str(program.core("step").graph)


@pytest.mark.parametrize("name", ["penalty", "matmul", "layer norm", "convolution", "scaled by a row"])
def test_both_factors_one_sided(name: str) -> None:
    verified(FINE[name], trainable="lora_A+lora_B", noise="rademacher")


def test_a_product_with_a_computed_weight_is_grouped() -> None:
    text = str(verified(FINE["linear with a computed weight"]))
    assert text.count("mp_lora(") == 2
    assert "ungroup" not in text


def test_a_penalty_in_the_loss() -> None:
    class Penalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Lora(6, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.layer(x), y) + 0.1 * self.layer.lora_B.weight.square().sum()

    model, inputs = seeded(Penalized()), (random(BATCH, 6), integers(4, BATCH))
    mz.verify(mz.transform(model, inputs), model, inputs)


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (lambda y, b: y - y.mean(0) * b[:, 0], mz.BatchCoupled, "reduces or normalizes over the batch"),
        (lambda y, b: F.linear(y.permute(1, 2, 0), b[:3, :].T[:, :3].contiguous()).permute(2, 0, 1).repeat(2, 1, 1)[:3],
         mz.BatchCoupled, "contracts the batch dimension"),
        (lambda y, b: y + torch.searchsorted(torch.sort(b.T).values[:1].squeeze(0), y).float(), mz.UnsupportedOp,
         "searchsorted"),
    ],
)  # fmt: skip
def test_refusals_name_the_node(body: Body, kind: type[mz.MobizoError], reason: str) -> None:
    with pytest.raises(kind, match=reason) as caught:
        verified(body)
    assert "at %" in str(caught.value)
    assert "test_per_group.py, line" in str(caught.value)
