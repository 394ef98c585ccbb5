"""Heads of keys and values that several heads of queries share."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mobizo_passes.graph.nodes import arguments, shape_of

aten = torch.ops.aten


def before_repeat(node: Any) -> Node | None:
    """Return the heads [N, G, T, d] before each is repeated: reshape(expand(…), [N, G·r, T, d]); None if none is."""
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
