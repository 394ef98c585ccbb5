"""Norms whose squares half precision can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from lowering.passes.layers.fuse_norms import written_out
from mobizo_passes.graph.nodes import shape_of

aten = torch.ops.aten

# A row divided by its mean size has no element above its width; this much of it can be squared in a half (65504).
_LARGEST = 200.0
# Far below what rows of activations are like, and its inverse does not overflow float16.
_TINY = 1e-4


@dataclass(frozen=True)
class BoundNorms:
    """An RMS norm written out divides each row by its size before it squares.

    BEFORE  y = x * rsqrt(mean(x * x, -1) + eps)                                                     x: f32[N,T,d]
    AFTER   s = mean(|x|, -1) * max(1, d / 200) + 1e-4;  u = x / s                                   s: f32[N,T,1]
            t = rsqrt(s) * rsqrt(s) * sqrt(eps);  y = u / sqrt(mean(u * u, -1) + t * t)

    The same number, and no square is above 40,000 whatever the row: halves end at 65504, and language models have
    activations of 20,000, whose norm would be zero. 1e-4 keeps a row of zeros from dividing by zero. For layer norms
    after `decompose-norms`, whose rows are centred there.
    """

    name: str = "bound-norms"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.mul.Tensor):
            found = written_out(node)
            if found is not None:
                with editor.before(node):
                    editor.replace(node, _bounded(editor, *found))
                rewrites += 1
        return rewrites


def _bounded(editor: ProgramEditor, x: Node, eps: float) -> Node:
    size = editor.call(aten.mean.dim, editor.call(aten.abs.default, x), [-1], True)
    size = editor.call(aten.mul.Tensor, size, max(1.0, shape_of(x)[-1] / _LARGEST))
    size = editor.call(aten.add.Tensor, size, _TINY)
    u = editor.call(aten.div.Tensor, x, size)
    root = editor.call(aten.rsqrt.default, size)
    t = editor.call(aten.mul.Tensor, editor.call(aten.mul.Tensor, root, root), math.sqrt(eps))
    square = editor.call(aten.mean.dim, editor.call(aten.mul.Tensor, u, u), [-1], True)
    spread = editor.call(aten.add.Tensor, square, editor.call(aten.mul.Tensor, t, t))
    # Not `rsqrt`: ExecuTorch's Vulkan stage would take that for a norm of its own, and fail on an eps that is computed.
    return editor.call(aten.div.Tensor, u, editor.call(aten.sqrt.default, spread))
