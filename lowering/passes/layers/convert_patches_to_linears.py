"""Convolutions over patches that do not overlap, as products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertPatchesToLinears(NodePass):
    """A `conv2d` whose stride is its kernel becomes a `linear` over the patches' pixels, in at most 4 dimensions.

    BEFORE  y = conv2d(x: f32[B,C,H*p,W*p], w: f32[o,C,p,p], b, stride=[p,p])                       f32[B,o,H,W]
    AFTER   r = permute(reshape(x, [B*C*H, p, W, p]), [0,2,1,3])                                     [B*C*H,W,p,p]
            r = permute(reshape(r, [B, C, H*W, p*p]), [0,2,1,3])                                     [B,H*W,C,p*p]
            y = reshape(permute(linear(reshape(r, [B,H*W,C*p*p]), reshape(w, [o,C*p*p]), b), [0,2,1]), [B,o,H,W])

    This is how vision transformers embed patches. Vulkan convolves a batch of one alone. Padding, dilation and groups
    are left alone.
    """

    name: ClassVar[str] = "convert-patches-to-linears"
    operators = (aten.conv2d.default, aten.convolution.default)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        return _rewrite(ir, node) if _matches(node) else None


def _matches(node: Node) -> bool:
    given = arguments(node)
    x, weight = shape_of(given.input), shape_of(given.weight)
    if len(x) != 4 or len(weight) != 4 or given.get("transposed", False):
        return False
    plain = given.groups == 1 and not any(given.padding) and all(each == 1 for each in given.dilation)
    tiles = x[2] % weight[2] == 0 and x[3] % weight[3] == 0
    return plain and tiles and list(given.stride) == list(weight[2:])


def _rewrite(ir: Ir, node: Node) -> Node:
    x: Any = node.args[0]
    weight: Any = node.args[1]
    batch, channels, height, width = shape_of(x)
    out, _, p, q = shape_of(weight)
    rows, columns = height // p, width // q
    pieces = ir.reshape(x, [batch * channels * rows, p, columns, q])
    pieces = ir.call(aten.permute.default, pieces, [0, 2, 1, 3])
    pieces = ir.reshape(pieces, [batch, channels, rows * columns, p * q])
    pieces = ir.call(aten.permute.default, pieces, [0, 2, 1, 3])
    flat = ir.reshape(pieces, [batch, rows * columns, channels * p * q])
    matrix = ir.reshape(weight, [out, channels * p * q])
    product = ir.call(aten.linear.default, flat, matrix, arguments(node).bias)
    turned = ir.call(aten.permute.default, product, [0, 2, 1])
    return ir.reshape(turned, [batch, out, rows, columns])
