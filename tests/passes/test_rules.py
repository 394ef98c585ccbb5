"""Lifting rules: every family on perturbed values against the reference, and every refusal by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.rules import RULES
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


FINE: dict[str, Body] = {
    # products
    "matmul by a matrix": lambda h: h @ M,
    "matmul by a vector": lambda h: h @ V,
    "vector by matmul": lambda h: V @ h.transpose(1, 2),
    "matmul of two perturbed": lambda h: h @ h.transpose(1, 2),
    "matmul from the left": lambda h: fixed(LENGTH, LENGTH) @ h,
    "bmm": lambda h: torch.bmm(h.transpose(1, 2), h),
    "bmm with a shared operand": lambda h: torch.bmm(fixed(BATCH, 2, LENGTH), h),
    "addmm": lambda h: torch.addmm(V, h.reshape(-1, WIDTH), M).reshape(BATCH, LENGTH, WIDTH),
    "addmm with a bias per row": lambda h: torch.addmm(fixed(BATCH, WIDTH), h[:, 0], M),
    "baddbmm": lambda h: torch.baddbmm(fixed(BATCH, LENGTH, LENGTH), h, h.transpose(1, 2)),
    "einsum": lambda h: torch.einsum("btd,bsd->bts", h, h),
    "outer product": lambda h: h.unsqueeze(-1) * h.unsqueeze(-2),
    "batch in the columns": lambda h: (M @ h[:, 0].T).T,
    # attention
    "attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "causal attention": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
    "attention with a shared key": lambda h: F.scaled_dot_product_attention(h, fixed(BATCH, LENGTH, WIDTH), h),
    "attention with a mask per example": lambda h: F.scaled_dot_product_attention(
        h, h, h, attn_mask=fixed(BATCH, LENGTH, LENGTH)
    ),
    "grouped-query attention": lambda h: F.scaled_dot_product_attention(
        h.view(BATCH, LENGTH, 4, 2).transpose(1, 2), (k := h[..., :4].view(BATCH, LENGTH, 2, 2).transpose(1, 2)), k,
        enable_gqa=True,
    ).flatten(2),
    "multi-head attention": lambda h: h + _mha(h),
    # normalisations and reductions
    "softmax": lambda h: h.softmax(1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "cumsum": lambda h: h.cumsum(1),
    "layer_norm": lambda h: F.layer_norm(h, (WIDTH,)),
    "layer_norm over two dims": lambda h: F.layer_norm(h, (LENGTH, WIDTH)),
    "rms_norm": lambda h: F.rms_norm(h, (WIDTH,)),
    "group_norm": lambda h: F.group_norm(h.transpose(1, 2), 2),
    "batch_norm in eval mode": lambda h: F.batch_norm(h.transpose(1, 2), V, V.abs() + 1),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "cosine": lambda h: F.cosine_similarity(h, h.flip(1), dim=1),
    "sum": lambda h: h.sum((1,), keepdim=True),
    "mean of two": lambda h: h.view(BATCH, LENGTH, 2, 4).mean((1, 3)),
    "amax": lambda h: h.amax(1),
    "max": lambda h: h.max(1).values,
    "var": lambda h: h.var(-1, keepdim=True).expand(-1, -1, 3),
    "std": lambda h: h / h.std(-1, keepdim=True),
    "logsumexp": lambda h: h.logsumexp(1),
    "vector norm": lambda h: torch.linalg.vector_norm(h, dim=1),
    "prod": lambda h: h.prod(1),
    "argmax": lambda h: h * h.argmax(1, keepdim=True),
    # convolutions
    "conv1d": lambda h: F.conv1d(h.transpose(1, 2), fixed(8, 8, 2)),
    "conv2d": lambda h: F.conv2d(h.unsqueeze(1), fixed(2, 1, 2, 2)),
    "max_pool1d": lambda h: F.max_pool1d(h, 2),
    "adaptive pooling": lambda h: F.adaptive_avg_pool2d(h.unsqueeze(1), (2, 2)),
    # moving
    "fold and unfold": lambda h: torch.tanh(h.reshape(-1, WIDTH)).reshape(BATCH, LENGTH, WIDTH),
    "batch inside": lambda h: h.transpose(0, 1).reshape(LENGTH * BATCH, WIDTH).view(LENGTH, BATCH, 8).permute(1, 0, 2),
    "batch innermost": lambda h: h.permute(2, 1, 0).reshape(WIDTH * LENGTH, BATCH).T.reshape(BATCH, WIDTH, LENGTH),
    "heads folded in": lambda h: h.view(BATCH, LENGTH, 2, 4).transpose(1, 2).reshape(BATCH * 2, LENGTH, 4).tanh().view(
        BATCH, 2, LENGTH, 4
    ),
    "unflatten": lambda h: h.unflatten(-1, (2, 4)).sum(2),
    "squeeze": lambda h: h.mean(1, keepdim=True).squeeze(1),
    "movedim": lambda h: h.movedim(1, 0).tanh().movedim(0, 1),
    "mT": lambda h: h.mT.tanh(),
    "expand": lambda h: h.unsqueeze(2).expand(-1, -1, 3, -1).reshape(BATCH, LENGTH * 3, WIDTH),
    "repeat": lambda h: h.repeat(1, 2, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, 1),
    "cat with a shared value": lambda h: torch.cat([h, fixed(BATCH, 2, WIDTH)], 1),
    "stack with a shared value": lambda h: torch.stack([h, fixed(BATCH, LENGTH, WIDTH)], 0).sum(0),
    "flip": lambda h: h.flip(1).cumsum(1),
    "pad": lambda h: F.pad(h, (0, 0, 1, 0))[:, :-1],
    "tril": lambda h: (h @ h.mT).tril(),
    # picking
    "slice": lambda h: h[:, 1:4:2],
    "select": lambda h: h[:, -1] * h[:, 0],
    "split": lambda h: torch.cat(h.split(2, 1)[::-1], 1).cumsum(1),
    "chunk": lambda h: h.chunk(2, -1)[0] * torch.sigmoid(h.chunk(2, -1)[1]),
    "unbind": lambda h: h.unbind(1)[2] - h.unbind(1)[0],
    "gather": lambda h: h.gather(1, fixed_integers(LENGTH, BATCH, 2, WIDTH)),
    "topk": lambda h: h.topk(3, 1).values,
    "sort": lambda h: h.sort(1).values[:, 0],
    "embedding of perturbed ids": lambda h: F.embedding(h.argmax(-1), fixed(WIDTH, 4)) + h.sum(-1, keepdim=True),
    "index of positions": lambda h: h[:, torch.tensor([0, 3])] * h[:, torch.tensor([1, 1])],
    "index of rows": lambda h: h.tanh()[ROWS] + h,
    "index of rows from the back": lambda h: h.tanh()[torch.tensor([-1, -3, -2])] + h,
    "index of rows and positions": lambda h: h[torch.arange(BATCH), torch.tensor([4, 0, 2])] + h[:, 0],
    "index of rows by a column": lambda h: h[torch.arange(BATCH)[:, None], torch.tensor([[0, 1], [2, 2], [4, 0]])],
    "index_select of rows": lambda h: h.tanh().index_select(0, ROWS) * h,
    "index of a table by perturbed ids": lambda h: fixed(WIDTH, 4)[h.argmax(-1)] + h.sum(-1, keepdim=True),
    "index of weights by perturbed experts": lambda h: (
        fixed(3, WIDTH, 4)[h[..., :3].argmax(-1)] * h.unsqueeze(-1)
    ).sum(2),
    "index of two dimensions by perturbed ids": lambda h: (
        fixed(WIDTH, WIDTH, 4)[h.argmax(-1), h.argmin(-1)] + h.sum(-1, keepdim=True)
    ),
    "index of a later dimension by perturbed ids": lambda h: (
        fixed(4, WIDTH)[:, h.argmax(-1)].permute(1, 2, 0) + h[..., :4]
    ),
    "index of rows and perturbed positions": lambda h: h[torch.arange(BATCH), h.sum(-1).argmax(1)] + h[:, 0],
    "index_select by perturbed ids": lambda h: fixed(WIDTH, 4).index_select(0, h.argmax(-1).flatten()).view(
        BATCH, LENGTH, 4
    ) + h[..., :4],
    "one_hot": lambda h: F.one_hot(h.argmax(-1), WIDTH) * h,
    "scatter": lambda h: torch.zeros_like(h).scatter(-1, h.topk(2, -1).indices, 1.0) * h,
    "scatter_add": lambda h: h.scatter_add(1, fixed_integers(LENGTH, BATCH, 2, WIDTH), h[:, :2]),
    "write into a slice": lambda h: written(h, lambda z: z[..., 2:4].add_(1.0)),
    "write into a column of a shared value": lambda h: written(
        fixed(BATCH, LENGTH, WIDTH), lambda z: z[:, 1].copy_(h[:, 0])
    ),
    "take_along_dim": lambda h: torch.take_along_dim(h, h.argsort(-1), -1),
    "roll": lambda h: h.roll(1, 1) - h,
    "glu": lambda h: F.glu(h, -1),
    "hardswish": lambda h: F.hardswish(h),
    "logsigmoid": lambda h: F.logsigmoid(h),
    "distances within an example": lambda h: torch.cdist(h, h) @ h,
    "distances to prototypes": lambda h: torch.cdist(h, fixed(3, WIDTH)),
    "distances of rows to prototypes": lambda h: torch.cdist(h[:, 0], fixed(3, WIDTH)),
    "cosine_embedding_loss": lambda h: F.cosine_embedding_loss(
        h[:, 0], h[:, 1], torch.ones(BATCH), reduction="none"
    ).unsqueeze(1) + h[:, 0],
    "adaptive_max_pool": lambda h: F.adaptive_max_pool1d(h.transpose(1, 2), 2).transpose(1, 2),
    "diagonal": lambda h: (h @ h.mT).diagonal(dim1=1, dim2=2).unsqueeze(-1) + h,
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 0, 3]), h[:, :3]),
    "Fourier transform": lambda h: torch.fft.rfft(h, dim=1).abs(),
    "median": lambda h: h.median(1).values,
    "cummax": lambda h: h.cummax(1).values,
    "prelu": lambda h: F.prelu(h, torch.tensor(0.2)),
    "instance norm": lambda h: F.instance_norm(h.transpose(1, 2)).transpose(1, 2),
    "upsampling": lambda h: F.interpolate(h.transpose(1, 2), scale_factor=2.0).transpose(1, 2),
    "transposed convolution": lambda h: F.conv_transpose1d(h.transpose(1, 2), fixed(WIDTH, 3, 2)).transpose(1, 2),
    # element-wise
    "masked_fill": lambda h: h.masked_fill(fixed(BATCH, LENGTH, 1) > 0, -2.0),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "per-example factor": lambda h: h * torch.arange(1.0, BATCH + 1)[:, None, None],
    "clamp and round": lambda h: h.clamp(-1, 1) + h.round(),
    "cast": lambda h: h.double().sigmoid().float(),
    "zeros_like": lambda h: torch.where(h > 0, h, torch.zeros_like(h)),
    "new_zeros": lambda h: h + h.new_ones(BATCH, 1, 1),
}  # fmt: skip


def _mha(h: Tensor) -> Tensor:
    call: Any = F.multi_head_attention_forward
    return call(
        *[h.transpose(0, 1)] * 3, WIDTH, 2, fixed(24, 8), fixed(24), None, None, False, 0.0, M, V,
        training=False, need_weights=False,
    )[0].transpose(0, 1)  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_perturbed_operator_agrees_with_the_reference(name: str) -> None:
    program = compile_and_verify(FINE[name])
    assert program.to_networkx().nodes[_loss_name(program)]["shape"] == [4]


def _loss_name(program: mz.TrainingProgram) -> str:
    return program._methods["step"].output_node("losses").name


def test_recurrent_cell() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(x.shape[0], 5)
            for t in range(LENGTH):
                state = self.cell(x[:, t], state)
            return state

    compile_and_verify(lambda h: h, Cell())


def test_row_index_given_as_an_input_may_count_from_the_back() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = Lora(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            h = self.layer(x)
            return self.head(h[rows] * h)

    model, inputs = seeded(Rows()), (random(BATCH, 6), torch.tensor([-1, 0, -2]), integers(4, BATCH))
    mz.verify(mz.transform(model, inputs, loss=cross_entropy), model, inputs)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "binary cross-entropy with logits": lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=torch.ones(4)),
    "binary cross-entropy": lambda o, y: F.binary_cross_entropy(o.sigmoid(), y),
    "soft margin": F.soft_margin_loss,
    "kl": lambda o, y: F.kl_div(o.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "nll": lambda o, y: F.nll_loss(o.log_softmax(-1), y.argmax(-1)),
    "soft targets": lambda o, y: F.cross_entropy(o, y.softmax(-1)),
    "two terms": lambda o, y: F.mse_loss(o, y) + 0.1 * o.square().mean(),
    "three terms": lambda o, y: 1 + 2 * F.l1_loss(o, y) + o.abs().sum() * 0.1 - F.mse_loss(o, y) / 3,
    "root of a mean": lambda o, y: F.mse_loss(o, y).sqrt(),
    "masked mean": lambda o, y: ((o - y).square() * (y > 0.5)).sum() / (y > 0.5).sum(),
    "unreduced then reduced": lambda o, y: F.mse_loss(o, y, reduction="none").sum(-1).mean(),
    "vector": lambda o, y: F.mse_loss(o, y, reduction="none").sum(-1),
    "cosine": lambda o, y: 1 - F.cosine_similarity(o, y).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_agrees_with_the_reference(name: str) -> None:
    model, _ = build(lambda h: h)
    inputs = (random(BATCH, LENGTH, 6), random(BATCH, 4).sigmoid())
    program = mz.transform(model, inputs, loss=LOSSES[name], estimator=mz.TwoSided(2))
    mz.verify(program, model, inputs)
    assert program.manifest()["methods"]["loss"]["outputs"][0]["shape"] == []


REFUSED: dict[str, tuple[Body, type[mz.MobizoError], str]] = {
    "contrastive loss": (lambda h: (z := h.mean(1)) @ z.T, mz.BatchCoupled, "multiplies examples .* with one another"),
    "contrastive by linear": (lambda h: F.linear(h.mean(1), h.mean(1)), mz.UnsupportedOp, "perturbed"),
    "einsum over examples": (lambda h: torch.einsum("btd,ctd->bc", h, h), mz.BatchCoupled, "multiplies examples"),
    "contraction of the batch": (lambda h: fixed(4, BATCH) @ h[:, 0], mz.BatchCoupled, "multiplies examples"),
    "mean over the batch": (lambda h: h - h.mean(0, keepdim=True), mz.BatchCoupled, "reduces or normalises over"),
    "mean over everything": (lambda h: h - h.mean(), mz.BatchCoupled, "reduced over the whole batch feeds"),
    "division by the mean": (lambda h: h / h.abs().mean(), mz.BatchCoupled, "reduced over the whole batch feeds"),
    "softmax over the batch": (lambda h: h.softmax(0), mz.BatchCoupled, "normalises over the batch"),
    "cumsum over the batch": (lambda h: h.cumsum(0), mz.BatchCoupled, "over the batch dimension"),
    "layer_norm over the batch": (
        lambda h: F.layer_norm(h.transpose(0, 1), (BATCH, WIDTH)).transpose(0, 1),
        mz.BatchCoupled,
        "normalises over the batch",
    ),
    "sort over the batch": (lambda h: h.sort(0).values, mz.BatchCoupled, "sorts examples"),
    "topk over the batch": (lambda h: h.topk(BATCH, 0).values, mz.BatchCoupled, "ranks examples"),
    "cat along the batch": (lambda h: torch.cat([h, h], 0)[:BATCH], mz.BatchCoupled, "concatenates along the batch"),
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
    "repeat of the batch": (lambda h: h.repeat(2, 1, 1).view(2, BATCH, LENGTH, 8).sum(0), mz.UnsupportedOp, "repeats"),
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
        assert re.search(r"in module '.*', (test_rules|models|batchnorm)\.py, line \d+", str(caught.value))


def test_a_refusal_names_the_module() -> None:
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    model, inputs = build(lambda h: h, Centre())
    with pytest.raises(mz.BatchCoupled, match=r"%mean = aten.mean.dim in module 'extra', test_rules.py"):
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
    with pytest.raises(mz.CaptureError, match=r"draws random numbers.*aten.native_dropout.default in module 'extra'"):
        mz.transform(model.train(), inputs, loss=cross_entropy)


@pytest.mark.parametrize("body", [torch.rand_like, lambda h: h + torch.randn(BATCH, 1, 1), F.dropout])
def test_random_numbers_are_refused(body: Body) -> None:
    model, inputs = build(body)
    with pytest.raises(mz.CaptureError, match="draws random numbers"):
        mz.transform(model, inputs, loss=cross_entropy)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    """Perturbed values can't enter one; before the adapter it runs as it is."""

    class Recurrent(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.loop, self.layer = (
                first,
                kind(6, 6, batch_first=True, dropout=0.3, num_layers=2),
                Lora(6, 6),
            )
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.loop(x)[0]) if self.first else self.loop(self.layer(x))[0]
            return self.head(y[:, -1])

    inputs = (random(BATCH, LENGTH, 6), integers(4, BATCH))
    model = seeded(Recurrent(True))
    mz.verify(mz.transform(model, inputs, loss=cross_entropy), model, inputs)
    with pytest.raises(
        mz.UnsupportedOp, match=rf"a whole {kind.__name__} is one operator; write its loop over time out"
    ):
        mz.transform(seeded(Recurrent(False)), inputs, loss=cross_entropy)


def test_data_dependent_control_flow_is_refused() -> None:
    model, inputs = build(lambda h: h if h.sum() > 0 else -h)
    with pytest.raises(mz.CaptureError, match="could not capture Around"):
        mz.transform(model, inputs, loss=cross_entropy)


def test_every_rule_is_a_known_operator() -> None:
    assert all(isinstance(target, torch._ops.OpOverload) for target in RULES)
