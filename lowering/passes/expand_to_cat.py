"""Copies along an axis without `expand`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor, shape_of

aten = torch.ops.aten

_BROADCASTING = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.where.self,
    aten.bitwise_and.Tensor,
    aten.__and__.Tensor,
    aten.logical_and.default,
)


@dataclass(frozen=True)
class ExpandToCat:
    """An `expand` that broadcasting makes needless goes; one that copies along one axis becomes `cat`.

    BEFORE  y = expand(x: f32[1,B,T,d], [P,B,T,d]);  z = add(a: f32[P,B,T,d], expand(b: f32[1,B,T,d], [P,B,T,d]))
    AFTER   y = cat([x] * P, 0);                     z = add(a, b)

    XNNPACK has no expand, and ExecuTorch's portable one costs ten times a copy. Axes grown from 1 only; more than
    `max_copies` copies, or several axes at once, are left alone.
    """

    max_copies: int = 64
    name: str = "expand-to-cat"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.expand.default):
            source: Any = node.args[0]
            rewrites += _drop_where_broadcast(node, source)
            if not node.users:
                editor.graph.erase_node(node)
                continue
            before, after = shape_of(source), shape_of(node)
            before = (1,) * (len(after) - len(before)) + before
            grown = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
            if len(grown) != 1 or after[grown[0]] > self.max_copies or after[grown[0]] < 2:
                continue
            with editor.before(node):
                piece = editor.reshape(source, list(before))
                editor.replace(node, editor.call(aten.cat.default, [piece] * after[grown[0]], grown[0]))
            rewrites += 1
        return rewrites


def _drop_where_broadcast(node: Node, source: Node) -> int:
    dropped = 0
    for user in list(node.users):
        if user.target not in _BROADCASTING or any(a is node for a in user.kwargs.values()):
            continue
        shapes = [shape_of(source if a is node else a) for a in user.args if isinstance(a, Node)]
        if tuple(torch.broadcast_shapes(*shapes)) == shape_of(user):
            user.args = tuple(source if a is node else a for a in user.args)
            dropped += 1
    return dropped
