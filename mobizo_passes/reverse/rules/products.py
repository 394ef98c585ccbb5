"""Matrix products: the cotangent of each factor is a product with the other."""

from __future__ import annotations

import torch

from mobizo_passes.reverse.table import WHOLE, Call, NoRule, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def summed_to(value: Value, shape: tuple[int, ...]) -> Value:
    """Sum over the dimensions that broadcasting added in front or stretched from 1."""
    wanted = (*[1] * (len(value.shape) - len(shape)), *shape)
    stretched = [i for i, (size, want) in enumerate(zip(value.shape, wanted, strict=True)) if size != want]
    return value.sum(stretched, keepdim=True).reshape(shape)


def left(g: Value, a: Value, b: Value) -> Value:
    """g bᵀ, the cotangent of a in a b; vectors are matrices of one row or column."""
    if len(b.shape) == 1:
        g, b = g.unsqueeze(-1), b.unsqueeze(-1)
    if len(a.shape) == 1:
        g = g.unsqueeze(-2)
    return summed_to(g @ b.transpose(), a.shape if len(a.shape) > 1 else (1, *a.shape)).reshape(a.shape)


def right(g: Value, a: Value, b: Value) -> Value:
    """aᵀ g, the cotangent of b in a b; a sum over all rows where b is one matrix for all examples."""
    if len(a.shape) == 1:
        a, g = a.unsqueeze(0), g.unsqueeze(-1 if len(b.shape) == 1 else -2)
    if len(b.shape) == 1:
        g = g.reshape([*a.shape[:-1], 1])
    if len(b.shape) <= 2:
        return (a.rows().transpose() @ g.rows()).reshape(b.shape)
    return summed_to(a.transpose() @ g, b.shape)


def _bias(g: Value, bias: Value) -> Value:
    return summed_to(g, bias.shape)


def _weight(n: Call, g: Value) -> Value:
    return (g.rows().transpose() @ n.input.rows()).reshape(n.weight.shape)


def _one_hot_rows(n: Call, g: Value) -> Value:
    if n.padding_idx >= 0:
        raise NoRule("of an embedding with a padding index")
    classes, width = n.weight.shape
    return n.indices.reshape([-1]).one_hot(classes, g.dtype).transpose() @ g.reshape([-1, width])


def _gathered(n: Call, g: Value) -> Value:
    """Each picked position gives its cotangent back to where it was picked."""
    return n.index.one_hot(n.x.shape[1], g.dtype).transpose() @ g


rows(
    WHOLE, aten.linear.default,
    input=lambda n, g: g @ n.weight, weight=_weight, bias=lambda n, g: _bias(g, n.bias),
)  # fmt: skip
rows(
    WHOLE, (aten.matmul.default,),
    self=lambda n, g: left(g, n.self, n.other), other=lambda n, g: right(g, n.self, n.other),
)  # fmt: skip
rows(
    WHOLE, (aten.mm.default, aten.bmm.default),
    self=lambda n, g: left(g, n.self, n.mat2), mat2=lambda n, g: right(g, n.self, n.mat2),
)  # fmt: skip
rows(
    WHOLE, aten.addmm.default,
    self=lambda n, g: _bias(g * n.beta, n.self),
    mat1=lambda n, g: left(g * n.alpha, n.mat1, n.mat2), mat2=lambda n, g: right(g * n.alpha, n.mat1, n.mat2),
)  # fmt: skip
rows(
    WHOLE, aten.baddbmm.default,
    self=lambda n, g: _bias(g * n.beta, n.self),
    batch1=lambda n, g: left(g * n.alpha, n.batch1, n.batch2),
    batch2=lambda n, g: right(g * n.alpha, n.batch1, n.batch2),
)  # fmt: skip
rows(
    WHOLE, aten.mv.default,
    self=lambda n, g: left(g, n.self, n.vec), vec=lambda n, g: right(g, n.self, n.vec),
)  # fmt: skip
rows(WHOLE, aten.embedding.default, weight=_one_hot_rows)
rows(WHOLE, torch.ops.mobizo.gather_rows.default, x=_gathered)
