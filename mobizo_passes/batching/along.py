"""Rules for operators that compute, select or move along some dimensions, and treat all others alike.

One row each: operators, the dimensions they work along, and why the batch can't be one of those.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layout, rule
from mobizo_passes.batching.shapes import only_first
from mobizo_passes.graph.nodes import arguments, positive_dim

aten = torch.ops.aten

# A node's arguments by name and the rank of its first operand -> dimensions, which may count from the back.
Dims = Callable[[Any, int], Collection[int]]


def named(*names: str) -> Dims:
    """The dimensions in arguments of these names; all of them where the argument is None, empty or not there."""

    def dims(given: Any, rank: int) -> Collection[int]:
        found: list[int] = []
        for name in names:
            value = given.get(name)
            found += [value] if isinstance(value, int) else value or range(rank)
        return found

    return dims


def last(count: int) -> Dims:
    """The last `count` dimensions."""
    return lambda given, rank: range(rank - count, rank)


def normalized(given: Any, rank: int) -> Collection[int]:
    """As many of the last dimensions as `normalized_shape` has."""
    return range(rank - len(given.normalized_shape), rank)


ALONG: tuple[tuple[str, Dims, tuple[Any, ...]], ...] = (
    ("it reduces or normalizes over the batch dimension", named("dim"), (
        aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
        aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default,
        aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
        aten.std.correction, aten.any.dim, aten.all.dim, aten.argmax.default, aten.argmin.default,
        aten.logsumexp.default, aten.prod.dim_int, aten.max.dim, aten.min.dim, aten.mean.default, aten.sum.default,
        aten.max.default, aten.min.default, aten.prod.default, aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim, aten._fft_r2c.default, aten._fft_c2c.default, aten._fft_c2r.default,
    )),
    ("it normalizes over the batch dimension", normalized, (
        aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default,
    )),
    ("it ranks examples of the batch against one another", named("dim"), (
        aten.topk.default, aten.median.dim, aten.mode.default, aten.kthvalue.default, aten.cummax.default,
        aten.cummin.default,
    )),
    ("it sorts examples of the batch against one another", named("dim"), (aten.sort.default,)),
    ("it gates one half of the batch by the other", named("dim"), (aten.glu.default,)),
    ("it pools over the dimension that holds the batch", last(1), (
        aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default,
        aten.adaptive_max_pool1d.default,
    )),
    ("it pools over the dimension that holds the batch", last(2), (
        aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default,
    )),
    ("it pools over the dimension that holds the batch", last(3), (
        aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default,
        aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool3d.default, aten.max_pool3d_with_indices.default,
    )),
    ("it takes examples of the batch for the two parts of a number", last(1), (aten.view_as_complex.default,)),
    ("", last(0), (aten.view_as_real.default,)),
    ("it cuts a triangle across the batch dimension", last(2), (aten.tril.default, aten.triu.default)),
    ("it takes one example out of the batch dimension", named("dim"), (aten.select.int,)),
    ("it splits the batch dimension", named("dim"), (aten.unbind.int,)),
    ("it pairs examples of the batch with positions", named("dim1", "dim2"), (aten.diagonal.default,)),
    ("it reorders the batch dimension", named("dims"), (aten.flip.default,)),
    ("it shifts the batch dimension", named("dims"), (aten.roll.default,)),
)  # fmt: skip


def _along(reason: str, dims: Dims) -> Callable[[Batcher, fx.Node], Layout | tuple[Layout, ...]]:
    def along(batcher: Batcher, node: fx.Node) -> Layout | tuple[Layout, ...]:
        layout, shape = only_first(batcher, node)
        found = {positive_dim(d, len(shape)) for d in dims(arguments(node), len(shape))}
        if layout.dim in found:
            raise batcher.refuse(node, reason)
        plain = batcher.plain[node]
        several = isinstance(plain, tuple | list)
        if (plain[0] if several else plain).dim() != len(shape):
            layout = Layout(layout.dim - sum(d < layout.dim for d in found), layout.outer)
        return (layout,) * len(plain) if several else layout

    return along


for _reason, _dims, _operators in ALONG:
    rule(*_operators)(_along(_reason, _dims))
