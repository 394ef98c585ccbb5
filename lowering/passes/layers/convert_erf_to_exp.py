"""The error function in functions that delegates have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from lowering.passes.layers.convert_gelu_to_exp import COEFFICIENTS, P
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten

# Values beyond `_NEAR` are cut off before they are scaled, so that halves hold the product. The error function of what
# is nearer to 0 than 1 / _STEEP is below the polynomial's own error.
_NEAR, _STEEP = 2.0**-7, 2.0**22
# Added to what a value is divided by for its sign.
_SMALL = 1e-4


@dataclass(frozen=True)
class ConvertErfToExp(NodePass):
    """`erf` becomes a polynomial times an exponential, times the sign.

    BEFORE  y = erf(x)
    AFTER   a = abs(x);  t = 1 / (1 + a * p);  s = clamp(clamp(x, -n, n) * 2^22, -1, 1)
            y = s * (1 - t * poly4(t) * exp(-a*a))

    It is in the derivative of the exact GELU, and no delegate has it. Off by at most 4e-7. With `ratio`, for integers,
    s = x / (a + 1e-4), off by 1e-4: where 16 bits are scaled by 2^22, QNN's results are 0.2 off.
    """

    ratio: bool = False
    name: ClassVar[str] = "convert-erf-to-exp"
    operators = (aten.erf.default,)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        return _rewrite(ir, node.args[0], self.ratio) if is_float(node.args[0]) else None


def _rewrite(ir: Ir, x: Any, ratio: bool) -> Node:
    def multiply(a: Node, b: Node | float) -> Node:
        return ir.call(aten.mul.Tensor, a, b)

    size = ir.call(aten.abs.default, x)
    one = ir.add_constant("one", torch.ones(1, dtype=x.meta["val"].dtype), ("one", x.meta["val"].dtype))
    t = ir.call(aten.div.Tensor, one, ir.call(aten.add.Tensor, multiply(size, P), 1.0))
    poly = multiply(t, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        poly = multiply(ir.call(aten.add.Tensor, poly, coefficient), t)
    fall = ir.call(aten.exp.default, multiply(multiply(size, size), -1.0))
    if ratio:
        sign = ir.call(aten.div.Tensor, x, ir.call(aten.add.Tensor, size, _SMALL))
    else:
        sign = multiply(ir.call(aten.clamp.default, x, -_NEAR, _NEAR), _STEEP)
        sign = ir.call(aten.clamp.default, sign, -1.0, 1.0)
    return multiply(sign, ir.call(aten.sub.Tensor, one, multiply(poly, fall)))
