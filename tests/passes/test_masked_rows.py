"""Rows that are NaN in the model, and that its loss does not read, do not make the program's losses NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.passes.test_layouts import Lora, numbers

INF = float("inf")
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0])


class Attention(nn.Module):
    """Padded queries attend to nothing; `how` says by which operators."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.table = nn.Embedding(9, 8)
        self.query, self.head = Lora(8, 8), Lora(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        query = self.query(x)
        seen = (mask[:, None, :] != 0) & (mask[:, :, None] != 0)
        scores = query @ query.transpose(1, 2) / 8**0.5
        added = torch.zeros(seen.shape).masked_fill(~seen, -INF)
        if self.how == "sums":  # 0 / 0
            weights = torch.exp(scores) * seen
            return self.head(weights / weights.sum(-1, keepdim=True) @ x)
        if self.how == "attention":
            return self.head(F.scaled_dot_product_attention(query, query, x, seen))
        if self.how == "attention, float mask":
            return self.head(F.scaled_dot_product_attention(query, query, x, added))
        masked = {
            "masked_fill": scores.masked_fill(~seen, -INF),
            "where": torch.where(seen, scores, torch.tensor(-INF)),
            "add": scores + added,
            "finite": scores.masked_fill(~seen, -1e9),
        }[self.how]
        return self.head(torch.softmax(masked, -1) @ x)


IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5], [8, 0, 7, 2, 3]])
MASK = torch.ones(3, 5, dtype=torch.int64)
MASK[0, :2] = MASK[1, 4:] = 0
LABELS = torch.tensor([[-100, -100, -100, 2, 0], [-100, -100, -100, 3, -100], [-100, -100, -100, 1, 1]])
NAN = ("masked_fill", "where", "add", "sums")


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), weight=WEIGHTS)


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), labels, reduction="sum")


def core_losses(program: mz.TrainingProgram, batch: tuple[Tensor, ...]) -> Tensor:
    """The losses of the program in core ATen, as it is lowered."""
    named = dict(zip(program.inputs.tensors, batch, strict=True))
    scalars = {"seed": torch.tensor([0]), "lr": torch.tensor([1e-3]), "eps": torch.tensor([1e-2])}
    return program.core_ir("step").run({**program.initial_adapter(), **named, **scalars})["losses"]


@pytest.mark.parametrize(
    ("how", "fn"),
    [
        ("masked_fill", loss),
        ("masked_fill", summed),
        ("where", weighted),
        ("sums", loss),
        ("add", loss),
        ("attention, float mask", loss),
    ],
)
def test_losses_are_the_model_s(how: str, fn: Any) -> None:
    model, batch = Attention(how).eval(), (IDS, MASK, LABELS)
    assert bool(model(IDS, MASK).isnan().any()) == (how in NAN)
    program = mz.transform(model, batch, loss=fn, estimator=mz.TwoSided(queries=2))
    step = mz.verify(program, model, batch)
    torch.testing.assert_close(core_losses(program, batch), step.losses, rtol=2e-5, atol=0)
    expected = float(fn(model(IDS, MASK), LABELS))
    assert program.loss(program.initial_adapter(), batch).item() == pytest.approx(expected, rel=2e-5)


def three_axes_gathered(program: mz.TrainingProgram) -> int:
    """How many gathers pick rows; a product with one-hot rows does otherwise."""
    nodes = program.core_ir("loss").graph.find_nodes(op="call_function", target=torch.ops.aten.gather.default)
    return sum(node.meta["val"].dim() == 3 for node in nodes)


def test_labels_are_picked_by_a_product_where_nothing_is_nan() -> None:
    """A gather would cut a delegate's partition in two."""
    program = mz.transform(Attention("finite").eval(), (IDS, MASK, LABELS), loss=loss)
    assert three_axes_gathered(program) == 0


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = Lora(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_padded_features_that_are_no_numbers(padding: float) -> None:
    x = numbers(3, 5, 6)
    x[LABELS == -100] = padding
    model, batch = Features().eval(), (x, LABELS)
    program = mz.transform(model, batch, loss=loss, estimator=mz.TwoSided(queries=2))
    step = mz.verify(program, model, batch)
    torch.testing.assert_close(core_losses(program, batch), step.losses, rtol=2e-5, atol=0)
