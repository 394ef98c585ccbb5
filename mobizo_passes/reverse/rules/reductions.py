"""Sums, means, softmax, extremes: what makes one number of many."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobizo_passes.reverse.rules.elementwise import zero
from mobizo_passes.reverse.table import REDUCTION, WHOLE, Call, NoRule, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def reduced(n: Call) -> list[int]:
    """The dimensions that a reduction runs over, as non-negative numbers."""
    rank, dims = len(n.self.shape), n.arguments.get("dim")
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted(dim % rank for dim in dims) if rank else []


def kept(n: Call, g: Any, dims: list[int] | None = None) -> Any:
    """g with a dimension of one in the place of each that was reduced."""
    if not isinstance(g, Value):
        return g
    dims = reduced(n) if dims is None else dims
    if not n.arguments.get("keepdim", False):
        rank = len(n.self.shape) - len(dims)
        shape = [*[1] * (rank - len(g.shape)), *g.shape]
        for dim in dims:
            shape.insert(dim, 1)
        return g.reshape(shape)
    return g


def _mean(n: Call, g: Any) -> Any:
    return kept(n, g / math.prod(n.self.shape[dim] for dim in reduced(n)))


def _extreme(n: Call, g: Any) -> Any:
    """Those that share the extreme share its cotangent, as in autograd."""
    dims = reduced(n)
    hit = n.self.equals(kept(n, n.out, dims)).to(n.self.dtype)
    return hit * (kept(n, g, dims) / hit.sum(dims, keepdim=True))


def _picked(n: Call, g: Value) -> Any:
    """The extreme of one dimension, with its place: `max.dim`, `min.dim`, `median.dim`, `kthvalue`."""
    if n.place == 1:
        return None
    dim = n.dim % len(n.self.shape)
    index = kept(n, n.result(1), [dim])
    return place(index, kept(n, g, [dim]), dim, n.self.shape)


def _ranked(n: Call, g: Value) -> Any:
    """`topk` and `sort`: values with their places."""
    return None if n.place == 1 else place(n.result(1), g, n.dim % len(n.self.shape), n.self.shape)


def place(index: Value, g: Value, dim: int, shape: tuple[int, ...]) -> Value:
    """Add g up at the places in `dim` of zeros of this shape that an index of its shape names."""
    if index.shape[dim] == 1:
        ones = [1] * len(shape)
        ones[dim] = shape[dim]
        return index.equals(g.tape.arange(shape[dim]).reshape(ones)).to(g.dtype) * g
    return g.tape.full(shape, 0.0, g.dtype).call(aten.scatter_add.default, dim, index, g)


def _softmax(n: Call, g: Value) -> Value:
    weighted = g * n.out
    return weighted - n.out * weighted.sum([n.dim], keepdim=True)


def _norm(n: Call, g: Any) -> Any:
    order = n.arguments.get("ord", n.arguments.get("p", 2))
    out = kept(n, n.out)
    if order in (2, None):
        # 0 where the norm is 0, as in autograd: there the quotient would be 0 / 0.
        return kept(n, g) * out.equals(0).where(n.tape.full([], 0.0, out.dtype), n.self / out)
    if order == 1:
        return kept(n, g) * n.self.call(aten.sign.default)
    raise NoRule(f"of the order {order}")


def _cumsum(n: Call, g: Value) -> Value:
    return g.call(aten.flip.default, [n.dim]).call(aten.cumsum.default, n.dim).call(aten.flip.default, [n.dim])


rows(REDUCTION, (aten.sum.default, aten.sum.dim_IntList), self=lambda n, g: kept(n, g))
rows(REDUCTION, (aten.mean.default, aten.mean.dim), self=_mean)
rows(REDUCTION, (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default), self=_extreme)
rows(REDUCTION, aten.logsumexp.default, self=lambda n, g: kept(n, g) * (n.self - kept(n, n.out)).exp())
rows(REDUCTION, (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), self=_norm)
rows(WHOLE, (aten.max.dim, aten.min.dim, aten.median.dim, aten.kthvalue.default), self=_picked)
rows(WHOLE, (aten.topk.default, aten.sort.default), self=_ranked)
rows(WHOLE, (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default), self=_softmax)
rows(
    WHOLE, (aten.log_softmax.int, aten._log_softmax.default),
    self=lambda n, g: g - n.out.exp() * g.sum([n.dim], keepdim=True),
)  # fmt: skip
rows(WHOLE, aten.cumsum.default, self=_cumsum)
rows(WHOLE, (aten.argmax.default, aten.argmin.default), self=zero)
