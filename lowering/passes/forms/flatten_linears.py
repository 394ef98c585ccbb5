"""Linear layers on rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class FlattenLinears(NodePass):
    """`linear` on a tensor of rank `least_rank` or more works on its rows.

    BEFORE  y = linear(x: f32[N,T,d], w: f32[o,d])
    AFTER   y = reshape(linear(reshape(x, [N*T,d]), w), [N,T,o])

    QNN's fully connected layer gives a matrix, whatever the rank of what it is given. Vulkan's shader is right up to
    rank 3; of four axes, where the first is above 1, it writes the first slice alone.
    """

    least_rank: int = 3

    name: ClassVar[str] = "flatten-linears"
    operators = (aten.linear.default,)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        given = arguments(node)
        shape = shape_of(given.input)
        if len(shape) < self.least_rank or not is_float(node):
            return None
        rows = ir.reshape(given.input, [math.prod(shape[:-1]), shape[-1]])
        operands = (given.weight,) if given.bias is None else (given.weight, given.bias)
        product = ir.call(aten.linear.default, rows, *operands)
        return ir.reshape(product, shape_of(node))
