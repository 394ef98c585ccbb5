"""Layer norm and RMS norm in elementary operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, is_float

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeNorms:
    """Normalisations over the last axis become mean, subtract, square, `rsqrt`, multiply.

    BEFORE  y = layer_norm(x: f32[B,T,d], [d], w, b, eps)
    AFTER   c = x - mean(x, -1);  y = c * rsqrt(mean(c * c, -1) + eps) * w + b      (mean: f32[B,T,1])

    BEFORE  y = rms_norm(x: f32[B,T,d], [d], w, eps)
    AFTER   y = x * rsqrt(mean(x * x, -1) + eps) * w

    XNNPACK has no layer norm, and ExecuTorch's own decomposition ends in a portable `native_layer_norm`.
    """

    name: str = "decompose-norms"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default):
            shape = arguments(node).normalized_shape
            if len(shape) != 1 or not is_float(node.args[0]) or node.target is aten.native_layer_norm.default:
                continue
            with editor.before(node):
                editor.replace(node, _rewrite(editor, node))
            rewrites += 1
        return rewrites


def _rewrite(editor: ProgramEditor, node: Node) -> Node:
    x: Any = node.args[0]
    weight = arguments(node).weight
    bias = None
    if node.target is aten.layer_norm.default:
        bias = arguments(node).bias
        eps = arguments(node).eps
        x = editor.call(aten.sub.Tensor, x, editor.call(aten.mean.dim, x, [-1], True))
    else:
        eps = arguments(node).eps
        eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
    square = editor.call(aten.mul.Tensor, x, x)
    spread = editor.call(aten.add.Tensor, editor.call(aten.mean.dim, square, [-1], True), eps)
    y = editor.call(aten.mul.Tensor, x, editor.call(aten.rsqrt.default, spread))
    if weight is not None:
        y = editor.call(aten.mul.Tensor, y, weight)
    return y if bias is None else editor.call(aten.add.Tensor, y, bias)
