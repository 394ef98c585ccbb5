"""Operators with an exact core-ATen twin, renamed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of, val
from mobizo_passes.graph.passes import NodePass, absent

aten = torch.ops.aten

TWINS: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
    aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
}
FILLS: dict[Any, int] = {aten.zeros_like.default: 0, aten.ones_like.default: 1}
SOFTMAXES: dict[Any, Any] = {
    aten.softmax.int: aten._softmax.default,
    aten.log_softmax.int: aten._log_softmax.default,
}


@dataclass(frozen=True)
class LowerToCoreAten(NodePass):
    """Python-operator and composite overloads become the core operators that they call.

    BEFORE  c = __and__(a: bool[B,1,T,T], b);  p = softmax(x: f32[B,C], -1);  y = __rshift__(i: i64[n], 16)
    AFTER   c = bitwise_and(a, b);             p = _softmax(x, -1, False);    y = bitwise_right_shift(i, 16)

    BEFORE  pad(labels: i64[B,T], [0, 1], "constant", -100.0)
    AFTER   constant_pad_nd(labels, [0, 1], -100)                                                  i64[B,T+1]

    ExecuTorch's runtime has no kernels for the former, and with the latter it need not decompose the program at all.
    """

    name: ClassVar[str] = "lower-to-core-aten"
    operators = (*TWINS, *FILLS, *SOFTMAXES, aten.sum.default, aten.pad.default)
    ensures = (absent(*TWINS, *FILLS, *SOFTMAXES, aten.sum.default),)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        target: Any = node.target
        given = arguments(node)
        if target in TWINS:
            return ir.call(TWINS[target], *node.args)
        if target in FILLS:
            return ir.call(aten.full.default, list(shape_of(node)), FILLS[target], dtype=val(node).dtype)
        if target is aten.sum.default:
            dims = list(range(len(shape_of(given.self))))
            return ir.call(aten.sum.dim_IntList, given.self, dims, dtype=val(node).dtype)
        if target in SOFTMAXES:
            source = given.self
            if given.dtype not in (None, val(source).dtype):
                source = ir.call(aten._to_copy.default, source, dtype=given.dtype)
            return ir.call(SOFTMAXES[target], source, given.dim, False)
        if given.mode != "constant":
            return None
        fill = 0 if given.value is None else given.value
        fill = float(fill) if is_float(node) else int(fill)
        return ir.call(aten.constant_pad_nd.default, given.self, given.pad, fill)
