"""Products with weights, in the one form that delegates pack."""

from __future__ import annotations

import math
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

    BEFORE  y = linear(x: f32[n,i], w: f32[o,i]);  z = matmul(g: f32[B,T,o], w)         a product and its gradient
    AFTER   y = linear(x, w);  z = reshape(mm(reshape(g, [B*T,o]), w), [B,T,i])         with `keep_shared` alone

    `linear` with a weight is the form that XNNPACK packs, that QNN takes and that the Vulkan runtime is known to do
    right. `addmm` with factors is left alone. `keep_shared`: a matrix that a `linear` reads too is not turned, which
    would store it twice; for delegates that take `mm` as well.
    """

    name: ClassVar[str] = "convert-weights-to-linears"
    operators = (aten.addmm.default, aten.mm.default, aten.matmul.default)
    keep_shared: bool = False

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
        if self.keep_shared and bias is None and _is_linears(weight):
            if node.target is aten.mm.default:
                return None
            rows = ir.reshape(x, [math.prod(shape_of(x)[:-1]), shape_of(x)[-1]])
            return ir.reshape(ir.call(aten.mm.default, rows, weight), list(shape_of(node)))
        turned = ir.call(aten.permute.default, weight, [1, 0])
        # ExecuTorch's XNNPACK stage takes a third argument for a node, even a None.
        return ir.call(aten.linear.default, x, turned, *(() if bias is None else (bias,)))


def _is_linears(weight: Node) -> bool:
    return any(user.target is aten.linear.default and user.args[1] is weight for user in weight.users)
