"""Reciprocal roots that a quantizer would take for a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float, val
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertRsqrtToSqrt(NodePass):
    """`rsqrt` becomes one over a root.

    BEFORE  r = rsqrt(mean(x * x, -1) + eps)
    AFTER   r = 1 / sqrt(mean(x * x, -1) + eps)

    For reciprocal roots outside of norms that are whole: the derivative of a norm reads them too. Qualcomm's quantizer
    looks for norms by their `rsqrt`, and fails on what it takes for one.
    """

    name: ClassVar[str] = "convert-rsqrt-to-sqrt"
    operators = (aten.rsqrt.default,)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        if not is_float(node.args[0]):
            return None
        dtype = val(node).dtype
        one = ir.add_constant("one", torch.ones(1, dtype=dtype), ("one", dtype))
        return ir.call(aten.div.Tensor, one, ir.call(aten.sqrt.default, node.args[0]))
