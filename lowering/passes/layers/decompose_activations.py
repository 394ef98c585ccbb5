"""Activations in functions that XNNPACK has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeActivations(NodePass):
    """`silu`, tanh-`gelu` and small integer powers in products, sigmoids and tanhs.

    BEFORE  silu(x);  gelu(x, approximate="tanh");  pow(x, 3.0)
    AFTER   x * sigmoid(x);  0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x*x*x)));  x * x * x

    BEFORE  h = silu(x);  …  s = sigmoid(x)                                                      in its derivative
    AFTER   s = sigmoid(x);  h = x * s;  …                                        x need not be kept until then

    Exact `gelu` stays: XNNPACK has it. Its tanh form must go, for ExecuTorch's XNNPACK visitor ignores `approximate`
    and would compute the exact one. XNNPACK's only power is the integer 2.
    """

    name: ClassVar[str] = "decompose-activations"
    operators = (aten.silu.default, aten.gelu.default, aten.pow.Tensor_Scalar)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        x: Any = node.args[0]
        if not is_float(x) or not is_float(node):
            return None
        if node.target is aten.silu.default:
            return ir.call(aten.mul.Tensor, x, _sigmoid(ir, x, node))
        if node.target is aten.gelu.default:
            return _tanh_gelu(ir, x) if arguments(node).approximate == "tanh" else None
        exponent = arguments(node).exponent
        if exponent not in (2, 3):
            return None
        square = ir.call(aten.mul.Tensor, x, x)
        return square if exponent == 2 else ir.call(aten.mul.Tensor, square, x)


def _sigmoid(ir: Ir, x: Node, silu: Node) -> Node:
    """The one sigmoid of `x`: that of a derivative too, which stands after `silu`."""
    others = [user for user in x.users if user.target is aten.sigmoid.default]
    first = min(others, default=None)
    sigmoid = ir.call(aten.sigmoid.default, x) if first is None or silu < first else first
    for each in others:
        if each is not sigmoid:
            ir.replace(each, sigmoid)
    return sigmoid


def _tanh_gelu(ir: Ir, x: Node) -> Node:
    cube = ir.call(aten.mul.Tensor, ir.call(aten.mul.Tensor, x, x), x)
    inner = ir.call(aten.add.Tensor, x, ir.call(aten.mul.Tensor, cube, 0.044715))
    bend = ir.call(aten.tanh.default, ir.call(aten.mul.Tensor, inner, math.sqrt(2.0 / math.pi)))
    return ir.call(aten.mul.Tensor, ir.call(aten.mul.Tensor, x, 0.5), ir.call(aten.add.Tensor, bend, 1.0))
