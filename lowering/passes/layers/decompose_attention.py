"""Attention as two batched products and a plain softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, shape_of, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention(Pass):
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
    name: ClassVar[str] = "decompose-attention"

    def rewrite(self, ir: Ir) -> int:
        masks: dict[Node, tuple[Node, Node | None]] = {}
        rewrites = 0
        for node in ir.find(aten.scaled_dot_product_attention.default):
            if arguments(node).dropout_p != 0.0 or len(shape_of(node)) != 4:
                continue
            with ir.before(node):
                bias, valid = self._mask(ir, node, masks)
                result = _attend(ir, node, bias)
                ir.replace(node, result if valid is None else ir.call(aten.mul.Tensor, result, valid))
            rewrites += 1
        return rewrites

    def _mask(self, ir: Ir, node: Node, masks: dict[Node, tuple[Node, Node | None]]) -> tuple[Node | None, Node | None]:
        given = arguments(node)
        mask = given.attn_mask
        if given.is_causal:
            t, s = shape_of(given.query)[-2], shape_of(given.key)[-2]
            future = torch.ones(1, 1, t, s, dtype=torch.bool).triu(1)
            table = torch.zeros(1, 1, t, s, dtype=val(node).dtype).masked_fill(future, -self.bias)
            return ir.add_constant("causal_bias", table, ("causal_bias", t, s, table.dtype)), None
        if mask is None:
            return None, None
        if mask not in masks:
            place = mask.next
            while place.op == "placeholder":
                place = place.next
            with ir.before(place):
                masks[mask] = self._bias_and_valid(ir, mask, val(node).dtype)
        return masks[mask]

    def _bias_and_valid(self, ir: Ir, mask: Node, dtype: torch.dtype) -> tuple[Node, Node | None]:
        shape = shape_of(mask)
        given = mask
        mask = ir.reshape(mask, [1] * (4 - len(shape)) + list(shape))
        if val(mask).dtype == torch.bool:
            allowed = mask
            as_float = ir.call(aten._to_copy.default, mask, dtype=dtype)
            bias = ir.call(aten.mul.Tensor, ir.call(aten.sub.Tensor, as_float, 1.0), self.bias)
        else:
            allowed = ir.call(aten.gt.Scalar, mask, -math.inf)
            bias = ir.call(aten.clamp.default, mask, -self.bias)
        if ir.is_constant(given):
            value = ir.constant_value(given)
            empty = ~value if value.dtype == torch.bool else value == -math.inf
            if not bool(empty.all(-1).any()):
                return bias, None
        valid = ir.call(aten._to_copy.default, ir.call(aten.any.dim, allowed, -1, True), dtype=dtype)
        return bias, valid


def _attend(ir: Ir, node: Node, bias: Node | None) -> Node:
    given = arguments(node)
    query, key, value = given.query, given.key, given.value
    n, heads, t, d = shape_of(query)
    groups, s = shape_of(key)[1:3]
    e = shape_of(value)[3]
    rows = heads // groups * t
    scale = 1.0 / math.sqrt(d) if given.scale is None else float(given.scale)
    if groups * s < heads * t:  # with grouped heads, the keys are fewer numbers to scale
        key = ir.call(aten.mul.Tensor, key, scale)
    else:
        query = ir.call(aten.mul.Tensor, query, scale)
    left = ir.reshape(query, [n * groups, rows, d])
    turned = ir.call(aten.permute.default, ir.reshape(key, [n * groups, s, d]), [0, 2, 1])
    scores = ir.reshape(ir.call(aten.bmm.default, left, turned), [n, heads, t, s])
    if bias is not None:
        scores = ir.call(aten.add.Tensor, scores, bias)
    weights = ir.call(aten._softmax.default, scores, 3, False)
    mixed = ir.call(aten.bmm.default, ir.reshape(weights, [n * groups, rows, s]), ir.reshape(value, [n * groups, s, e]))
    return ir.reshape(mixed, [n, heads, t, e])
