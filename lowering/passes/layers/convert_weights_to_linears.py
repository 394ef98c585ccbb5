"""Products with weights, in the one form that delegates pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float, shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertWeightsToLinears(NodePass):
    """`addmm`, `mm` and `matmul` with a constant matrix on the right become `linear`, the matrix turned here, once.

    BEFORE  y = addmm(b: f32[o], x: f32[n,i], w: f32[i,o])                       w a weight, stored [in, out] as GPT-2's
    AFTER   y = linear(x, permute(w, [1,0]): f32[o,i], b)                         the permutation is folded later

    `linear` with a weight is the form that XNNPACK packs, that QNN takes and that the Vulkan runtime is known to do
    right. `addmm` with factors is left alone.
    """

    name: ClassVar[str] = "convert-weights-to-linears"
    operators = (aten.addmm.default, aten.mm.default, aten.matmul.default)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        operands: Any = node.args
        bias = operands[0] if node.target is aten.addmm.default else None
        x, weight = operands[-2], operands[-1]
        if node.kwargs or not ir.is_constant(weight) or not is_float(x):
            return None
        if len(shape_of(weight)) != 2 or len(shape_of(x)) < 2:
            return None
        if bias is not None and shape_of(bias) != shape_of(weight)[1:]:
            return None
        turned = ir.call(aten.permute.default, weight, [1, 0])
        # ExecuTorch's XNNPACK stage takes a third argument for a node, even a None.
        return ir.call(aten.linear.default, x, turned, *(() if bias is None else (bias,)))
