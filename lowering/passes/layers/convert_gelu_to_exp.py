"""The exact GELU in functions that every GPU has."""

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

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7 in erf.
P = 0.3275911
COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@dataclass(frozen=True)
class ConvertGeluToExp(NodePass):
    """Exact `gelu` becomes a polynomial times an exponential.

    BEFORE  y = gelu(x)                                                        x * normal_cdf(x)
    AFTER   a = abs(x);  t = 1 / (1 + a * p/sqrt(2));  y = relu(x) - a * t * poly4(t) * exp(-a*a/2) / 2

    Vulkan's shader computes the tanh form whatever the model asks for (off by up to 5e-4), and has no `erf`. Off by at
    most 1e-7 * |x|. The tanh form itself is left to `DecomposeActivations`.
    """

    name: ClassVar[str] = "convert-gelu-to-exp"
    operators = (aten.gelu.default,)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        return _rewrite(ir, node.args[0]) if arguments(node).approximate == "none" and is_float(node) else None


def _rewrite(ir: Ir, x: Any) -> Node:
    def multiply(a: Node, b: Node | float) -> Node:
        return ir.call(aten.mul.Tensor, a, b)

    size = ir.call(aten.abs.default, x)
    # exp(-log(1 + c*a)) would do as well; a division costs less.
    below = ir.call(aten.add.Tensor, multiply(size, P / math.sqrt(2.0)), 1.0)
    one = ir.add_constant("one", torch.ones(1, dtype=x.meta["val"].dtype), ("one", x.meta["val"].dtype))
    t = ir.call(aten.div.Tensor, one, below)
    poly = multiply(t, 0.5 * COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        poly = multiply(ir.call(aten.add.Tensor, poly, 0.5 * coefficient), t)
    fall = ir.call(aten.exp.default, multiply(multiply(size, size), -0.5))
    tail = multiply(size, multiply(poly, fall))
    return ir.call(aten.sub.Tensor, ir.call(aten.relu.default, x), tail)
