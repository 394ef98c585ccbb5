"""Grouped-query attention without materialized head copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mobizo_passes.graph.heads import before_repeat
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
            short_key, short_value = before_repeat(key), before_repeat(value)
            if short_key is None or short_value is None or arguments(node).enable_gqa:
                continue
            if shape_of(short_key)[1] != shape_of(short_value)[1]:
                continue
            node.args = (query, short_key, short_value, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            ir.refresh(node)
            rewrites += 1
        return rewrites
