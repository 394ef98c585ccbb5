"""Activations in functions that XNNPACK has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, is_float

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeActivations:
    """`silu`, tanh-`gelu` and small integer powers in products, sigmoids and tanhs.

    BEFORE  silu(x);  gelu(x, approximate="tanh");  pow(x, 3.0)
    AFTER   x * sigmoid(x);  0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x*x*x)));  x * x * x

    Exact `gelu` stays: XNNPACK has it. Its tanh form must go, for ExecuTorch's XNNPACK visitor ignores `approximate`
    and would compute the exact one. XNNPACK's only power is the integer 2.
    """

    name: str = "decompose-activations"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.silu.default, aten.gelu.default, aten.pow.Tensor_Scalar):
            if not is_float(node.args[0]) or not is_float(node):
                continue
            with editor.before(node):
                result = _rewrite(editor, node)
                if result is None:
                    continue
                editor.replace(node, result)
            rewrites += 1
        return rewrites


def _rewrite(editor: ProgramEditor, node: Node) -> Node | None:
    x: Any = node.args[0]
    if node.target is aten.silu.default:
        return editor.call(aten.mul.Tensor, x, editor.call(aten.sigmoid.default, x))
    if node.target is aten.gelu.default:
        return _tanh_gelu(editor, x) if arguments(node).approximate == "tanh" else None
    exponent = node.args[1]
    if exponent not in (2, 3):
        return None
    square = editor.call(aten.mul.Tensor, x, x)
    return square if exponent == 2 else editor.call(aten.mul.Tensor, square, x)


def _tanh_gelu(editor: ProgramEditor, x: Node) -> Node:
    cube = editor.call(aten.mul.Tensor, editor.call(aten.mul.Tensor, x, x), x)
    inner = editor.call(aten.add.Tensor, x, editor.call(aten.mul.Tensor, cube, 0.044715))
    bend = editor.call(aten.tanh.default, editor.call(aten.mul.Tensor, inner, math.sqrt(2.0 / math.pi)))
    return editor.call(aten.mul.Tensor, editor.call(aten.mul.Tensor, x, 0.5), editor.call(aten.add.Tensor, bend, 1.0))
