"""Copies along an axis without `expand`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor, is_float, shape_of, val

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
    aten.logical_and.default,
)


@dataclass(frozen=True)
class ExpandToCopies:
    """An `expand` that broadcasting makes needless goes; one that copies along an axis becomes `mul` or `cat`.

    BEFORE  z = add(a: f32[P,B,d], expand(b: f32[1,B,d], [P,B,d]))
    AFTER   z = add(a, b)

    BEFORE  y = expand(x: f32[1,B,T,d], [P,B,T,d]);  m = expand(k: bool[1,B,T], [P,B,T])
    AFTER   y = reshape(mul(reshape(x, [1,1,B*T*d]), ones: f32[1,P,1]), [P,B,T,d]);  m = cat([k] * P, 0)

    XNNPACK has no expand, and takes no concatenation of one tensor with itself; it does broadcast a product with ones,
    which is exact. ExecuTorch's own expand costs ten times a copy, its `cat` does not. With `multiply_floats` off, all
    copies are `cat`. Axes grown from 1 only; several axes at once, or more than `max_copies`, are left alone.
    """

    multiply_floats: bool = True
    max_copies: int = 64
    name: str = "expand-to-copies"

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
            if len(grown) != 1 or not 2 <= after[grown[0]] <= self.max_copies:
                continue
            with editor.before(node):
                if self.multiply_floats and is_float(source):
                    copies = _multiplied(editor, source, after, grown[0])
                else:
                    piece = editor.reshape(source, list(before))
                    copies = editor.call(aten.cat.default, [piece] * after[grown[0]], grown[0])
                editor.replace(node, copies)
            rewrites += 1
        return rewrites


def _multiplied(editor: ProgramEditor, source: Node, after: tuple[int, ...], axis: int) -> Node:
    copies, dtype = after[axis], val(source).dtype
    ones = editor.constant(torch.ones(1, copies, 1, dtype=dtype), "ones", ("ones", copies, dtype))
    flat = editor.reshape(source, [math.prod(after[:axis]), 1, math.prod(after[axis + 1 :])])
    return editor.reshape(editor.call(aten.mul.Tensor, flat, ones), list(after))


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
