"""Batching rules: every family on perturbed values against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.models import BATCH, LENGTH, Lora, cross_entropy, integers, random, seeded
from tests.passes.around import (
    ROWS,
    WIDTH,
    Body,
    M,
    V,
    build,
    compile_and_verify,
    fixed,
    fixed_integers,
    written,
)

POSITIONS = torch.tensor([5, 0, 2])
KEEP = torch.tensor([False, True, False, False, True])

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
    # normalizations and reductions
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
    "repeat of the batch": lambda h: (h.repeat(2, 1, 1).view(2, BATCH, LENGTH, 8).cumsum(0)).sum(0),
    "repeat_interleave": lambda h: h.repeat_interleave(2, 1),
    "cat with a shared value": lambda h: torch.cat([h, fixed(BATCH, 2, WIDTH)], 1),
    "stack with a shared value": lambda h: torch.stack([h, fixed(BATCH, LENGTH, WIDTH)], 0).sum(0),
    "flip": lambda h: h.flip(1).cumsum(1),
    "pad": lambda h: F.pad(h, (0, 0, 1, 0))[:, :-1],
    "tril": lambda h: (h @ h.mT).tril(),
    # picking
    "slice": lambda h: h[:, 1:4:2],
    "pairs side by side": lambda h: (z := torch.stack([h, h.tanh()], 1).flatten(0, 1))[::2] * z[1::2],
    "select": lambda h: h[:, -1] * h[:, 0],
    "cat along the batch, taken apart": lambda h: (two := torch.cat([h.tanh(), h * 2], 0))[BATCH:] - two[:BATCH],
    "cat along the batch, chunks": lambda h: torch.sub(*torch.cat([h.exp(), h]).chunk(2)),
    "three halves, split": lambda h: torch.cat([h, h.tanh(), -h]).split([2 * BATCH, BATCH])[0].view(2, *h.shape).sum(0),
    "products on halves": lambda h: (torch.cat([h, h * 2], 0) @ M).reshape(-1, WIDTH)[BATCH * LENGTH :].view(h.shape),
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
    "write at stored positions": lambda h: written(h, lambda z: z.__setitem__((..., POSITIONS), h[..., :3])),
    "write where a stored mask is true": lambda h: written(
        fixed(BATCH, LENGTH, WIDTH), lambda z: z.__setitem__((slice(None), KEEP), h[:, :2].tanh())
    ),
    "norm along features": lambda h: torch.norm(h, dim=-1, keepdim=True) * h,
    "p-norm": lambda h: torch.linalg.vector_norm(h, 3, dim=(1, 2)).unsqueeze(1) + h[:, 0],
    "pairwise distance": lambda h: F.pairwise_distance(h[:, 0], h[:, 1], p=1.0).unsqueeze(1) + h[:, 0],
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
    "triplet": lambda o, y: F.triplet_margin_loss(o, y, y.flip(1)),
    "triplet, swapped": lambda o, y: F.triplet_margin_loss(o, y, y.flip(1), margin=0.3, p=1.0, swap=True),
    "cosine embedding": lambda o, y: F.cosine_embedding_loss(o, y, torch.tensor([1.0, -1.0, 1.0]), margin=-0.5),
    "distance": lambda o, y: F.pairwise_distance(o, y).square().mean(),
    "norm": lambda o, y: torch.linalg.vector_norm(o - y, dim=-1).mean(),
    "cosine": lambda o, y: 1 - F.cosine_similarity(o, y).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_agrees_with_the_reference(name: str) -> None:
    model, _ = build(lambda h: h)
    inputs = (random(BATCH, LENGTH, 6), random(BATCH, 4).sigmoid())
    program = mz.transform(model, inputs, loss=LOSSES[name], estimator=mz.TwoSided(2))
    mz.verify(program, model, inputs)
    assert program.manifest()["methods"]["loss"]["outputs"][0]["shape"] == []
