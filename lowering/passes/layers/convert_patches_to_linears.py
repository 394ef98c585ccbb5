"""Convolutions over patches that do not overlap, as products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertPatchesToLinears:
    """A `conv2d` whose stride is its kernel becomes a `linear` over the patches' pixels, in at most 4 dimensions.

    BEFORE  y = conv2d(x: f32[B,C,H*p,W*p], w: f32[o,C,p,p], b, stride=[p,p])                       f32[B,o,H,W]
    AFTER   r = permute(reshape(x, [B*C*H, p, W, p]), [0,2,1,3])                                     [B*C*H,W,p,p]
            r = permute(reshape(r, [B, C, H*W, p*p]), [0,2,1,3])                                     [B,H*W,C,p*p]
            y = reshape(permute(linear(reshape(r, [B,H*W,C*p*p]), reshape(w, [o,C*p*p]), b), [0,2,1]), [B,o,H,W])

    This is how vision transformers embed patches. Vulkan convolves a batch of one alone. Padding, dilation and groups
    are left alone.
    """

    name: str = "convert-patches-to-linears"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.conv2d.default, aten.convolution.default):
            if not _matches(editor, node):
                continue
            with editor.before(node):
                editor.replace(node, _rewrite(editor, node))
            rewrites += 1
        return rewrites


def _matches(editor: ProgramEditor, node: Node) -> bool:
    x, weight = shape_of(node.args[0]), shape_of(node.args[1])
    if len(x) != 4 or len(weight) != 4:
        return False
    stride = arguments(node).stride
    padding = arguments(node).padding
    dilation = arguments(node).dilation
    is_core = node.target is aten.convolution.default
    groups = arguments(node).groups
    if is_core and arguments(node).transposed:
        return False
    plain = groups == 1 and all(each == 0 for each in padding) and all(each == 1 for each in dilation)
    tiles = x[2] % weight[2] == 0 and x[3] % weight[3] == 0
    return plain and tiles and list(stride) == list(weight[2:]) and isinstance(node.args[1], Node)


def _rewrite(editor: ProgramEditor, node: Node) -> Node:
    x: Any = node.args[0]
    weight: Any = node.args[1]
    batch, channels, height, width = shape_of(x)
    out, _, p, q = shape_of(weight)
    rows, columns = height // p, width // q
    pieces = editor.reshape(x, [batch * channels * rows, p, columns, q])
    pieces = editor.call(aten.permute.default, pieces, [0, 2, 1, 3])
    pieces = editor.reshape(pieces, [batch, channels, rows * columns, p * q])
    pieces = editor.call(aten.permute.default, pieces, [0, 2, 1, 3])
    flat = editor.reshape(pieces, [batch, rows * columns, channels * p * q])
    matrix = editor.reshape(weight, [out, channels * p * q])
    product = editor.call(aten.linear.default, flat, matrix, arguments(node).bias)
    turned = editor.call(aten.permute.default, product, [0, 2, 1])
    return editor.reshape(turned, [batch, out, rows, columns])
