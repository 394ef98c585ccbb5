"""What mixes the examples of a batch, or has no rule, is refused by name: node, operator, module and source line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.batching import RULES
from tests.models import BATCH, LENGTH, Lora, cross_entropy, integers, random, seeded
from tests.passes.around import (
    ROWS,
    WIDTH,
    Around,
    Body,
    build,
    fixed,
    written,
)

REFUSED: dict[str, tuple[Body, type[mz.MobizoError], str]] = {
    "contrastive loss": (lambda h: (z := h.mean(1)) @ z.T, mz.BatchCoupled, "multiplies examples .* with one another"),
    "contrastive by linear": (lambda h: F.linear(h.mean(1), h.mean(1)), mz.UnsupportedOp, "perturbed"),
    "einsum over examples": (lambda h: torch.einsum("btd,ctd->bc", h, h), mz.BatchCoupled, "multiplies examples"),
    "contraction of the batch": (lambda h: fixed(4, BATCH) @ h[:, 0], mz.BatchCoupled, "multiplies examples"),
    "mean over the batch": (lambda h: h - h.mean(0, keepdim=True), mz.BatchCoupled, "reduces or normalizes over"),
    "mean over everything": (lambda h: h - h.mean(), mz.BatchCoupled, "reduced over the whole batch feeds"),
    "division by the mean": (lambda h: h / h.abs().mean(), mz.BatchCoupled, "reduced over the whole batch feeds"),
    "softmax over the batch": (lambda h: h.softmax(0), mz.BatchCoupled, "normalizes over the batch"),
    "cumsum over the batch": (lambda h: h.cumsum(0), mz.BatchCoupled, "over the batch dimension"),
    "layer_norm over the batch": (
        lambda h: F.layer_norm(h.transpose(0, 1), (BATCH, WIDTH)).transpose(0, 1),
        mz.BatchCoupled,
        "normalizes over the batch",
    ),
    "sort over the batch": (lambda h: h.sort(0).values, mz.BatchCoupled, "sorts examples"),
    "topk over the batch": (lambda h: h.topk(BATCH, 0).values, mz.BatchCoupled, "ranks examples"),
    "cat of the batch and a row": (
        lambda h: torch.cat([h, fixed(1, LENGTH, WIDTH)], 0)[:BATCH],
        mz.BatchCoupled,
        "concatenates the batch with what",
    ),
    "one example": (lambda h: h - h[0], mz.BatchCoupled, "takes one example"),
    "some examples": (lambda h: h.tanh()[:1] + h, mz.BatchCoupled, "a part of"),
    "split examples": (lambda h: h.split(1, 0)[0] + h, mz.BatchCoupled, "splits the batch"),
    "unbind examples": (lambda h: torch.stack(h.unbind(0)), mz.BatchCoupled, "splits the batch"),
    "flip examples": (lambda h: h.tanh().flip(0) + h, mz.BatchCoupled, "reorders the batch"),
    "pad examples": (lambda h: F.pad(h, (0, 0, 0, 0, 1, 0))[1:], mz.BatchCoupled, "pads the batch"),
    "gather along the batch": (
        lambda h: h.tanh().gather(0, torch.zeros(BATCH, LENGTH, WIDTH, dtype=torch.int64)) + h,
        mz.BatchCoupled,
        "gathers along the batch",
    ),
    "attention across examples": (
        lambda h: F.scaled_dot_product_attention(t := h.transpose(0, 1), t, t).transpose(0, 1),
        mz.BatchCoupled,
        "attends across the batch",
    ),
    "pairs of examples": (
        lambda h: (h[:, None, 0] - h[None, :, 0]).sum(1) + h[:, 0],
        mz.BatchCoupled,
        "hold the batch in different dimensions",
    ),
    "conv over the batch": (lambda h: F.conv1d(h.transpose(0, 1), fixed(3, 3, 2)), mz.MobizoError, "mixes the dim"),
    "boolean index": (lambda h: h * h[fixed(BATCH, LENGTH, WIDTH) > 9].sum(), mz.MobizoError, "."),
    "a row by number": (lambda h: h + h[torch.tensor(1)], mz.BatchCoupled, "takes one example"),
    "roll of the batch": (lambda h: h.tanh().roll(1, 0) + h, mz.BatchCoupled, "shifts the batch"),
    "roll of everything": (lambda h: h.roll(1) + h, mz.BatchCoupled, "shifts the batch"),
    "distances between examples": (
        lambda h: torch.cdist(h[:, 0], h[:, 0]),
        mz.BatchCoupled,
        "distances between examples",
    ),
    "median over the batch": (lambda h: h - h.median(0).values, mz.BatchCoupled, "ranks examples"),
    "Fourier transform of the batch": (lambda h: torch.fft.rfft(h, dim=0).abs(), mz.BatchCoupled, "over the batch"),
    "diagonal of the batch": (lambda h: h.diagonal(dim1=0, dim2=1).T + h[:, 0], mz.BatchCoupled, "pairs examples"),
    "index_add along the batch": (
        lambda h: h.tanh().index_add(0, ROWS, h) + h,
        mz.BatchCoupled,
        "writes along the batch",
    ),
    "scatter along the batch": (
        lambda h: h.tanh().scatter(0, torch.zeros(1, LENGTH, WIDTH, dtype=torch.int64), 1.0) + h,
        mz.BatchCoupled,
        "writes along the batch",
    ),
    "write into an example": (
        lambda h: written(h, lambda z: z[1:].add_(1.0)),
        mz.BatchCoupled,
        "a part of the batch dimension",
    ),
    "perturbed rows of perturbed values": (
        lambda h: h[:, h.sum((1, 2)).long() % LENGTH].mean(1),
        mz.UnsupportedOp,
        "both perturbed",
    ),
    "statistics of the batch": (
        nn.BatchNorm1d(LENGTH, track_running_stats=False).train(),
        mz.BatchCoupled,
        "BatchNorm without running statist",
    ),
    "features written where a mask is true": (
        lambda h: written(h, lambda z: z.masked_scatter_((h[..., :1] > 0), fixed(BATCH, LENGTH, WIDTH))),
        mz.UnsupportedOp,
        r"depends on the masks of all examples before.*features\.gather",
    ),
    "lu": (lambda h: h + torch.linalg.det(h @ h.mT)[:, None, None], mz.UnsupportedOp, "is not in the rule table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, kind, reason = REFUSED[name]
    model: Any = Around(body)
    model.head = nn.Identity()
    inputs = (random(BATCH, LENGTH, 6), random(1))
    seeded(model)(inputs[0])
    with pytest.raises(kind, match=reason) as caught:
        mz.transform(seeded(model), inputs, loss=lambda o, y: o.square().sum(-1).mean() + y.sum())
    if kind is not mz.MobizoError:
        # The node, its operator, its module and its source line.
        assert "%" in str(caught.value)
        assert "aten." in str(caught.value)
        assert re.search(r"in module '.*', (around|test_refusals|models|batchnorm)\.py, line \d+", str(caught.value))


def test_a_refusal_names_the_module() -> None:
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    model, inputs = build(lambda h: h, Centre())
    with pytest.raises(mz.BatchCoupled, match=r"%mean = aten.mean.dim in module 'extra', test_refusals.py"):
        mz.transform(model, inputs, loss=cross_entropy)


def test_coupling_before_the_adapter_is_fine() -> None:
    """What no perturbed value reaches runs on the plain batch, whatever it does with it."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = Lora(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x - x.mean(0)))

    model, inputs = seeded(Centred()), (random(BATCH, 6), integers(4, BATCH))
    mz.verify(mz.transform(model, inputs, loss=cross_entropy), model, inputs)


def test_batch_norm_in_training_mode_is_refused() -> None:
    model, inputs = build(lambda h: h.transpose(1, 2), nn.BatchNorm1d(WIDTH))
    with pytest.raises(mz.CaptureError, match=r"changes its own state 'extra\..*call model.eval\(\)"):
        mz.transform(model.train(), inputs, loss=cross_entropy)


def test_dropout_in_training_mode_is_refused() -> None:
    model, inputs = build(lambda h: h, nn.Dropout(0.5))
    with pytest.raises(mz.CaptureError, match=r"draws random numbers.*aten.dropout.default in module 'extra'"):
        mz.transform(model.train(), inputs, loss=cross_entropy)


@pytest.mark.parametrize("body", [torch.rand_like, lambda h: h + torch.randn(BATCH, 1, 1), F.dropout])
def test_random_numbers_are_refused(body: Body) -> None:
    model, inputs = build(body)
    with pytest.raises(mz.CaptureError, match="draws random numbers"):
        mz.transform(model, inputs, loss=cross_entropy)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    """Behind the adapter, or with weights that are trained, a loop is written out; before it, it stays whole."""

    class Recurrent(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.loop, self.layer = first, kind(6, 6, 2, batch_first=True, dropout=0.3), Lora(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.loop(x)[0]) if self.first else self.loop(self.layer(x))[0]
            return self.head(y[:, -1])

    inputs = (random(BATCH, LENGTH, 6), integers(4, BATCH))
    for first, trainable in ((True, None), (False, None), (True, ["loop.weight_hh_l0", "loop.bias_ih_l1"])):
        model = seeded(Recurrent(first))
        program = mz.transform(model, inputs, loss=cross_entropy, trainable=trainable)
        mz.verify(program, model, inputs)
        whole = [node for node in program.exported_program.graph.nodes if "input" in str(node.target)]
        assert len(whole) == (trainable is None and first)


def test_data_dependent_control_flow_is_refused() -> None:
    model, inputs = build(lambda h: h if h.sum() > 0 else -h)
    with pytest.raises(mz.CaptureError, match="could not capture Around"):
        mz.transform(model, inputs, loss=cross_entropy)


def test_every_rule_is_a_known_operator() -> None:
    assert all(isinstance(target, torch._ops.OpOverload) for target in RULES)
