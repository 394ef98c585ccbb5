"""Norms whose squares half precision can hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from lowering.passes.layers.fuse_norms import reciprocal_root
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten

# A row divided by its mean size has no element above its width; this much of it can be squared in a half (65504).
_LARGEST = 200.0
# Far below what rows of activations are like, and its inverse does not overflow float16.
_TINY = 1e-4


@dataclass(frozen=True)
class BoundNorms(NodePass):
    """The reciprocal root of a row's mean square divides the row by its size before it squares.

    BEFORE  r = rsqrt(mean(x * x, -1) + eps)                                              x: f32[N,T,d], r: f32[N,T,1]
    AFTER   s = mean(|x|, -1) * max(1, d / 200) + 1e-4;  u = x / s                        s: f32[N,T,1]
            t = rsqrt(s) * rsqrt(s) * sqrt(eps);  r = 1 / (s * sqrt(mean(u * u, -1) + t * t))

    The same number, and no square is above 40,000 whatever the row: halves end at 65504, and language models have
    activations of 20,000, whose norm, and whose derivatives, would be zero. 1e-4 keeps a row of zeros from dividing by
    zero. For norms written out; layer norms are so after `decompose-norms`, with their rows centered.
    """

    name: ClassVar[str] = "bound-norms"
    operators = (aten.rsqrt.default,)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        found = reciprocal_root(node)
        return None if found is None else _bounded(ir, *found)


def _bounded(ir: Ir, x: Node, eps: float) -> Node:
    size = ir.call(aten.mean.dim, ir.call(aten.abs.default, x), [-1], True)
    size = ir.call(aten.mul.Tensor, size, max(1.0, shape_of(x)[-1] / _LARGEST))
    size = ir.call(aten.add.Tensor, size, _TINY)
    u = ir.call(aten.div.Tensor, x, size)
    root = ir.call(aten.rsqrt.default, size)
    t = ir.call(aten.mul.Tensor, ir.call(aten.mul.Tensor, root, root), math.sqrt(eps))
    square = ir.call(aten.mean.dim, ir.call(aten.mul.Tensor, u, u), [-1], True)
    spread = ir.call(aten.add.Tensor, square, ir.call(aten.mul.Tensor, t, t))
    # Not `rsqrt`: ExecuTorch's Vulkan stage would take that for a norm of its own, and fail on an eps that is computed.
    one = ir.add_constant("one", torch.ones(1, dtype=x.meta["val"].dtype), ("one", x.meta["val"].dtype))
    return ir.call(aten.div.Tensor, one, ir.call(aten.mul.Tensor, size, ir.call(aten.sqrt.default, spread)))
