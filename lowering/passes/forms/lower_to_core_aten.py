"""Operators with an exact core-ATen twin, renamed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, shape_of, val

aten = torch.ops.aten

_TWINS: dict[Any, Any] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
    aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
    aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
}
_SOFTMAXES: dict[Any, Any] = {
    aten.softmax.int: aten._softmax.default,
    aten.log_softmax.int: aten._log_softmax.default,
}


@dataclass(frozen=True)
class LowerToCoreAten:
    """Python-operator and composite overloads become the core operators that they call.

    BEFORE  c = __and__(a: bool[B,1,T,T], b);  p = softmax(x: f32[B,C], -1);  y = __rshift__(i: i64[n], 16)
    AFTER   c = bitwise_and(a, b);             p = _softmax(x, -1, False);    y = bitwise_right_shift(i, 16)

    BEFORE  pad(labels: i64[B,T], [0, 1], "constant", -100.0)
    AFTER   constant_pad_nd(labels, [0, 1], -100)                                                  i64[B,T+1]

    ExecuTorch's runtime has no kernels for the former, and with the latter it need not decompose the program at all.
    """

    name: str = "lower-to-core-aten"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(*_TWINS):
            node.target = _TWINS[node.target]
            rewrites += 1
        for node in editor.find(aten.zeros_like.default, aten.ones_like.default, aten.sum.default):
            rewrites += _rewrite_fill_or_sum(editor, node)
        for node in editor.find(aten.pad.default):
            rewrites += _rewrite_pad(node)
        for node in editor.find(*_SOFTMAXES):
            rewrites += _rewrite_softmax(editor, node)
        return rewrites


def _rewrite_softmax(editor: ProgramEditor, node: Node) -> bool:
    source: Any = node.args[0]
    dtype = arguments(node).dtype
    with editor.before(node):
        if dtype is not None and dtype != val(source).dtype:
            source = editor.call(aten._to_copy.default, source, dtype=dtype)
        editor.replace(node, editor.call(_SOFTMAXES[node.target], source, arguments(node).dim, False))
    return True


def _rewrite_pad(node: Node) -> bool:
    if arguments(node).mode != "constant":
        return False
    fill = arguments(node).value
    node.target = aten.constant_pad_nd.default
    fill = 0 if fill is None else fill
    is_float_tensor = val(node).is_floating_point()
    node.args = (node.args[0], arguments(node).pad, float(fill) if is_float_tensor else int(fill))
    node.kwargs = {}
    return True


def _rewrite_fill_or_sum(editor: ProgramEditor, node: Node) -> bool:
    shape = list(shape_of(node))
    dtype = val(node).dtype
    with editor.before(node):
        if node.target is aten.sum.default:
            source: Any = node.args[0]
            result = editor.call(aten.sum.dim_IntList, source, list(range(len(shape_of(source)))), dtype=dtype)
        else:
            fill = 0 if node.target is aten.zeros_like.default else 1
            result = editor.call(aten.full.default, shape, fill, dtype=dtype)
        editor.replace(node, result)
    return True
