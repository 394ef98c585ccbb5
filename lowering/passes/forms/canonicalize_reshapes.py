"""One form for everything that only renames the axes' extents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of
from mobizo_passes.graph.passes import NodePass, absent

aten = torch.ops.aten

RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_copy.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True)
class CanonicalizeReshapes(NodePass):
    """Views, unsqueezes, squeezes and flattens become `reshape`; `select` becomes `slice` + `reshape`.

    BEFORE  u = unsqueeze(x: f32[B,T,d], 1); v = view(u, [B, T, -1])
    AFTER   v = reshape(x, [B, T, d])

    BEFORE  h = select(x: f32[B,T,d], 1, -1)
    AFTER   h = reshape(slice(x, 1, T-1, T), [B, d])

    XNNPACK takes reshapes of any kind, but unsqueeze on the last axis only and no select. Chains of reshapes
    collapse. `reshape` (unlike `view`) asks nothing of strides, so later passes may change the producer.
    """

    name: ClassVar[str] = "canonicalize-reshapes"
    operators = (*RESHAPES, aten.select.int, aten.reshape.default)
    ensures = (absent(*RESHAPES, aten.select.int),)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        if node.target is aten.select.int:
            given = arguments(node)
            shape = shape_of(given.self)
            dim = positive_dim(given.dim, len(shape))
            start = positive_dim(given.index, shape[dim])
            piece = ir.call(aten.slice.Tensor, given.self, dim, start, start + 1)
            return ir.reshape(piece, shape_of(node))
        source = _source(node)
        is_plain = node.target is aten.reshape.default and source is arguments(node).self
        return (
            None if is_plain and tuple(arguments(node).shape) == shape_of(node) else ir.reshape(source, shape_of(node))
        )


def _source(node: Node) -> Node:
    while node.target in (*RESHAPES, aten.reshape.default):
        node = arguments(node).self
    return node
