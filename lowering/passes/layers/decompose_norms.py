"""Layer norm and RMS norm in elementary operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, val
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeNorms(NodePass):
    """Normalizations over the last axis become mean, subtract, square, `rsqrt`, multiply.

    BEFORE  y = layer_norm(x: f32[B,T,d], [d], w, b, eps)
    AFTER   c = x - mean(x, -1);  y = c * rsqrt(mean(c * c, -1) + eps) * w + b      (mean: f32[B,T,1])

    BEFORE  y = rms_norm(x: f32[B,T,d], [d], w, eps)
    AFTER   y = x * rsqrt(mean(x * x, -1) + eps) * w

    XNNPACK has no layer norm, and ExecuTorch's own decomposition ends in a portable `native_layer_norm`.
    """

    name: ClassVar[str] = "decompose-norms"
    operators = (aten.layer_norm.default, aten.rms_norm.default)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        given = arguments(node)
        x: Any = given.input
        if len(given.normalized_shape) != 1 or not is_float(x):
            return None
        eps, bias = given.eps, given.get("bias")
        if node.target is aten.layer_norm.default:
            x = ir.call(aten.sub.Tensor, x, ir.call(aten.mean.dim, x, [-1], True))
        elif eps is None:
            eps = torch.finfo(val(x).dtype).eps
        square = ir.call(aten.mul.Tensor, x, x)
        spread = ir.call(aten.add.Tensor, ir.call(aten.mean.dim, square, [-1], True), eps)
        y = ir.call(aten.mul.Tensor, x, ir.call(aten.rsqrt.default, spread))
        if given.weight is not None:
            y = ir.call(aten.mul.Tensor, y, given.weight)
        return y if bias is None else ir.call(aten.add.Tensor, y, bias)
