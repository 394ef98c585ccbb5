"""Grouped-query attention without materialized head copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, shape_of
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class GroupRepeatedHeads(Pass):
    """Attention over repeated key/value heads becomes attention with `enable_gqa`, on the heads there are.

    BEFORE  k2 = reshape(clone(expand(reshape(k: f32[N,G,T,d], [N,G,1,T,d]), [N,G,r,T,d])), [N,G*r,T,d]); v2 likewise
            scaled_dot_product_attention(q: f32[N,G*r,T,d], k2, v2, mask)
    AFTER   scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    Keys and values must be repeated the same number of times. Needs canonical reshapes; also takes
    `repeat_interleave(k, r, dim=1)`.
    """

    name: ClassVar[str] = "group-repeated-heads"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(aten.scaled_dot_product_attention.default):
            query, key, value = node.args[:3]
            short_key, short_value = _before_repeat(key), _before_repeat(value)
            if short_key is None or short_value is None or arguments(node).enable_gqa:
                continue
            if shape_of(short_key)[1] != shape_of(short_value)[1]:
                continue
            node.args = (query, short_key, short_value, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            ir.refresh(node)
            rewrites += 1
        return rewrites


def _before_repeat(node: Any) -> Node | None:
    if not isinstance(node, Node) or len(shape_of(node)) != 4:
        return None
    if node.target in (aten.repeat_interleave.self_int,):
        source = node.args[0]
        return source if isinstance(source, Node) and arguments(node).dim in (1, -3) else None
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    n, heads, t, d = shape_of(node)
    inner = node.args[0]
    while isinstance(inner, Node) and inner.target in (aten.clone.default, aten.contiguous.default):
        inner = inner.args[0]
    if not isinstance(inner, Node) or inner.target is not aten.expand.default:
        return None
    wide = shape_of(inner)
    source = inner.args[0]
    if not isinstance(source, Node) or len(wide) != 5 or wide[1] * wide[2] != heads:
        return None
    if shape_of(source) != (n, wide[1], 1, t, d):
        return None
    origin = source.args[0]
    is_unsqueeze = source.target in (aten.reshape.default, aten.unsqueeze.default, aten.view.default)
    if not is_unsqueeze or not isinstance(origin, Node) or shape_of(origin) != (n, wide[1], t, d):
        return None
    return origin
