"""Operators that pick elements by integers: the cotangent is added up where they were picked."""

from __future__ import annotations

from typing import Any

import torch

from mobizo_passes.reverse.rules.reductions import place
from mobizo_passes.reverse.table import WHOLE, Call, NoRule, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def _gather(n: Call, g: Value) -> Value:
    dim = n.dim % len(n.self.shape)
    if any(a != b for i, (a, b) in enumerate(zip(n.self.shape, g.shape, strict=True)) if i != dim):
        raise NoRule("of a gather from a part of a tensor")
    return place(n.index, g, dim, n.self.shape)


def _index_select(n: Call, g: Value) -> Value:
    """A product with a one-hot matrix, along the dimension that was picked from."""
    dim = n.dim % len(n.self.shape)
    picked = n.index.one_hot(n.self.shape[dim], g.dtype)
    turned = g.transpose(dim, -1) if dim != len(g.shape) - 1 else g
    given = turned @ picked
    return given.transpose(dim, -1) if dim != len(g.shape) - 1 else given


def _index(n: Call, g: Value) -> Value:
    for each in n.indices:
        if each is not None and each.dtype in (torch.bool, torch.uint8):
            raise NoRule("of an index by a mask")
    zeros = n.tape.full(n.self.shape, 0.0, g.dtype)
    return zeros.call(aten.index_put.default, n.indices, g, True)


def _kept_by_scatter(n: Call, g: Value) -> Value:
    return g.call(aten.scatter.value, n.dim, n.index, 0)


def _slice_scatter(n: Call, g: Value) -> Value:
    return g.call(aten.slice_scatter.default, n.tape.full(n.src.shape, 0.0, g.dtype), n.dim, n.start, n.end, n.step)


def _select_scatter(n: Call, g: Value) -> Value:
    return g.call(aten.select_scatter.default, n.tape.full(n.src.shape, 0.0, g.dtype), n.dim, n.index)


def _put(n: Call, g: Value) -> Any:
    if n.accumulate:
        return g
    return g.call(aten.index_put.default, n.indices, n.tape.full([], 0.0, g.dtype))


rows(WHOLE, aten.gather.default, self=_gather)
rows(WHOLE, aten.index_select.default, self=_index_select)
rows(WHOLE, aten.index.Tensor, self=_index)
rows(
    WHOLE, aten.index_put.default,
    self=_put, values=lambda n, g: _summed(g.call(aten.index.Tensor, n.indices), n.values.shape),
)  # fmt: skip
rows(WHOLE, aten.scatter.value, self=_kept_by_scatter)
rows(
    WHOLE, aten.scatter.src,
    self=_kept_by_scatter, src=lambda n, g: g.call(aten.gather.default, n.dim, n.index),
)  # fmt: skip
rows(
    WHOLE, aten.scatter_add.default,
    self=lambda n, g: g, src=lambda n, g: g.call(aten.gather.default, n.dim, n.index),
)  # fmt: skip
rows(
    WHOLE, aten.slice_scatter.default,
    self=_slice_scatter, src=lambda n, g: g.call(aten.slice.Tensor, n.dim, n.start, n.end, n.step),
)  # fmt: skip
rows(
    WHOLE, aten.select_scatter.default,
    self=_select_scatter, src=lambda n, g: g.call(aten.select.int, n.dim, n.index),
)  # fmt: skip


def _summed(value: Value, shape: tuple[int, ...]) -> Value:
    from mobizo_passes.reverse.rules.products import summed_to

    return summed_to(value, shape)
