"""Operands of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float, shape_of
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

_BROADCASTING = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    aten.expand.default,
)


@dataclass(frozen=True)
class EqualizeRanks(Pass):
    """A float operand with fewer axes than the result gets leading axes of extent 1; what broadcasting does anyway.

    BEFORE  y = add(x: f32[B,T,d], b: f32[d])
    AFTER   y = add(x, reshape(b, [1,1,d]))

    QNN aligns the axes of operands only when all have the same number of them. Reshapes of constants are then folded.
    """

    name: ClassVar[str] = "equalize-ranks"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*_BROADCASTING):
            if not is_float(node):
                continue
            rank = len(shape_of(node))
            for place, operand in enumerate(node.args):
                if not isinstance(operand, Node) or not is_float(operand) or len(shape_of(operand)) == rank:
                    continue
                shape = shape_of(operand)
                with ir.before(node):
                    node.update_arg(place, ir.reshape(operand, [1] * (rank - len(shape)) + list(shape)))
                rewrites += 1
        return rewrites
