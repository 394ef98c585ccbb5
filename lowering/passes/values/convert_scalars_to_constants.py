"""Numbers in float arithmetic as constant tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lowering.passes.values.convert_scalars_to_float import ARITHMETIC
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float, shape_of, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

_SCALAR_FORMS: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
}


@dataclass(frozen=True)
class ConvertScalarsToConstants(Pass):
    """The number in `x * 2`, `1 - x` or `x ** 1.5` becomes a one-element tensor of x's rank, shared by equal uses.

    BEFORE  y = mul(x: f32[B,T,d], 2.0)
    AFTER   y = mul(x, constant: f32[1,1,1])

    QNN's operator builders read tensors alone. Tensors of fewer than 1 axis have their numbers left as they are: they
    are the step's scalars, and stay outside of the delegate. `add` and `sub` with an `alpha` are left alone too.
    """

    name: ClassVar[str] = "convert-scalars-to-constants"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*ARITHMETIC, *_SCALAR_FORMS):
            if not is_float(node) or not node.args[1:] or node.kwargs or len(node.args) > 2:
                continue
            tensors = [each for each in node.args if is_float(each)]
            places = [i for i, each in enumerate(node.args) if isinstance(each, (int, float))]
            rank = len(shape_of(node))
            if len(tensors) != 1 or len(places) != 1 or rank == 0:
                continue
            value: Any = node.args[places[0]]
            number = torch.full((1,) * rank, float(value), dtype=val(node).dtype)
            constant = ir.add_constant("number", number, ("number", float(value), rank, number.dtype))
            node.update_arg(places[0], constant)
            node.target = _SCALAR_FORMS.get(node.target, node.target)
            rewrites += 1
        return rewrites
