"""Attention as two batched products and a plain softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, shape_of, val

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention:
    """`scaled_dot_product_attention` becomes `bmm`, add, softmax, `bmm`, all in 3-D and 4-D.

    BEFORE  y = scaled_dot_product_attention(q: f32[N,H,T,d], k: f32[N,G,S,d], v: f32[N,G,S,e], mask: bool[N,1,T,S])
    AFTER   per mask, once:  bias  = (mask - 1) * 1e9              f32[N,1,T,S]
                             valid = any(mask, -1)                 f32[N,1,T,1]
            per attention:   s = bmm(reshape(q, [N*G, H/G*T, d]), permute(reshape(k * scale, [N*G, S, d])))
                             p = softmax(reshape(s, [N,H,T,S]) + bias)
                             y = reshape(bmm(reshape(p, [N*G, H/G*T, S]), v), [N,H,T,e]) * valid

    With grouped queries (G < H) the group's heads are extra rows of the product: nothing is expanded. `valid` keeps
    the result exact (zero, as in ATen) for rows that may attend to nothing, such as padded positions; it is left out
    when the mask is a constant without such rows. The bias is finite, as XNNPACK and QNN want it. Float masks are
    clamped to `-bias`, and a row of them counts as empty when all of it is -inf. Dropout must be off.
    """

    bias: float = 1e9
    name: str = "decompose-attention"

    def __call__(self, editor: ProgramEditor) -> int:
        masks: dict[Node, tuple[Node, Node | None]] = {}
        rewrites = 0
        for node in editor.find(aten.scaled_dot_product_attention.default):
            if arguments(node).dropout_p != 0.0 or len(shape_of(node)) != 4:
                continue
            with editor.before(node):
                bias, valid = self._mask(editor, node, masks)
                result = _attend(editor, node, bias)
                if valid is not None:
                    result = editor.call(aten.mul.Tensor, result, valid)
            editor.replace(node, result)
            rewrites += 1
        return rewrites

    def _mask(
        self, editor: ProgramEditor, node: Node, masks: dict[Node, tuple[Node, Node | None]]
    ) -> tuple[Node | None, Node | None]:
        mask = arguments(node).attn_mask
        if arguments(node).is_causal:
            t, s = shape_of(node.args[0])[-2], shape_of(node.args[1])[-2]
            future = torch.ones(1, 1, t, s, dtype=torch.bool).triu(1)
            table = torch.zeros(1, 1, t, s, dtype=val(node).dtype).masked_fill(future, -self.bias)
            return editor.constant(table, "causal_bias", ("causal_bias", t, s, table.dtype)), None
        if mask is None:
            return None, None
        if mask not in masks:
            place = mask.next
            while place.op == "placeholder":
                place = place.next
            with editor.before(place):
                masks[mask] = self._bias_and_valid(editor, mask, val(node).dtype)
        return masks[mask]

    def _bias_and_valid(self, editor: ProgramEditor, mask: Node, dtype: torch.dtype) -> tuple[Node, Node | None]:
        shape = shape_of(mask)
        given = mask
        mask = editor.reshape(mask, [1] * (4 - len(shape)) + list(shape))
        if val(mask).dtype == torch.bool:
            allowed = mask
            as_float = editor.call(aten._to_copy.default, mask, dtype=dtype)
            bias = editor.call(aten.mul.Tensor, editor.call(aten.sub.Tensor, as_float, 1.0), self.bias)
        else:
            allowed = editor.call(aten.gt.Scalar, mask, -math.inf)
            bias = editor.call(aten.clamp.default, mask, -self.bias)
        if editor.is_constant(given):
            value = editor.constant_value(given)
            empty = ~value if value.dtype == torch.bool else value == -math.inf
            if not bool(empty.all(-1).any()):
                return bias, None
        valid = editor.call(aten._to_copy.default, editor.call(aten.any.dim, allowed, -1, True), dtype=dtype)
        return bias, valid


def _attend(editor: ProgramEditor, node: Node, bias: Node | None) -> Node:
    query, key, value = (n for n in node.args[:3] if isinstance(n, Node))
    n, heads, t, d = shape_of(query)
    groups, s = shape_of(key)[1:3]
    e = shape_of(value)[3]
    rows = heads // groups * t
    scale = arguments(node).scale
    scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
    if groups * s < heads * t:  # with grouped heads, the keys are fewer numbers to scale
        key = editor.call(aten.mul.Tensor, key, scale)
    else:
        query = editor.call(aten.mul.Tensor, query, scale)
    left = editor.reshape(query, [n * groups, rows, d])
    turned = editor.call(aten.permute.default, editor.reshape(key, [n * groups, s, d]), [0, 2, 1])
    scores = editor.reshape(editor.call(aten.bmm.default, left, turned), [n, heads, t, s])
    if bias is not None:
        scores = editor.call(aten.add.Tensor, scores, bias)
    weights = editor.call(aten._softmax.default, scores, 3, False)
    mixed = editor.call(
        aten.bmm.default, editor.reshape(weights, [n * groups, rows, s]), editor.reshape(value, [n * groups, s, e])
    )
    return editor.reshape(mixed, [n, heads, t, e])
