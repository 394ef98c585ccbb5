"""A mean over the last axis as a product with a constant row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of, val
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertMeansToLinears(NodePass):
    """`mean` (or `sum`) over the last axis becomes `linear` with one constant output row.

    BEFORE  m = mean(x: f32[B,T,d], [-1], keepdim=True)                       f32[B,T,1]
    AFTER   m = linear(x, constant: f32[1,d] filled with 1/d)                 f32[B,T,1]

    XNNPACK takes `mean.dim` over the last two axes of rank-4 tensors only, and no sum: each norm would split the graph.
    Reductions of tensors that stand for labels or losses (less than `min_size` along the axis) are left alone.
    """

    min_size: int = 8
    name: ClassVar[str] = "convert-means-to-linears"
    operators = (aten.mean.dim, aten.sum.dim_IntList)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        x: Any = node.args[0]
        if not self._matches(node):
            return None
        size = shape_of(x)[-1]
        factor = 1.0 / size if node.target is aten.mean.dim else 1.0
        row = ir.add_constant("mean_row", torch.full((1, size), factor, dtype=val(x).dtype))
        return ir.reshape(ir.call(aten.linear.default, x, row), shape_of(node))

    def _matches(self, node: Node) -> bool:
        x: Any = node.args[0]
        dims = arguments(node).dim
        if not is_float(x) or dims is None or len(dims) != 1 or val(node).dtype != val(x).dtype:
            return False
        rank = len(shape_of(x))
        return rank >= 2 and dims[0] in (-1, rank - 1) and shape_of(x)[-1] >= self.min_size
