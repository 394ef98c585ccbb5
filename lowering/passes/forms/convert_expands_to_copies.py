"""Copies along an axis without `expand`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, positive_dim, shape_of, val
from mobizo_passes.graph.passes import Pass

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
class ConvertExpandsToCopies(Pass):
    """An `expand` that broadcasting makes needless goes; one that copies along an axis becomes `mul` or `cat`.

    BEFORE  z = add(a: f32[P,B,d], expand(b: f32[1,B,d], [P,B,d]))
    AFTER   z = add(a, b)

    BEFORE  y = expand(x: f32[1,B,T,d], [P,B,T,d]);  m = expand(k: bool[1,B,T], [P,B,T])
    AFTER   y = reshape(mul(reshape(x, [1,1,B*T*d]), ones: f32[1,P,1]), [P,B,T,d]);  m = cat([k] * P, 0)

    BEFORE  y = cat([x: f32[B,T,d]] * P, 0)                                                             f32[P*B,T,d]
    AFTER   y = reshape(mul(reshape(x, [1,1,B*T*d]), ones: f32[1,P,1]), [P*B,T,d])

    XNNPACK has no expand, and takes no concatenation of one tensor with itself; it does broadcast a product with ones,
    which is exact. ExecuTorch's own expand costs ten times a copy, its `cat` does not. With `multiply_floats` off, all
    copies are `cat`. Axes grown from 1 only; several axes at once, or more than `max_copies`, are left alone.
    """

    multiply_floats: bool = True
    max_copies: int = 64
    name: ClassVar[str] = "convert-expands-to-copies"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(aten.expand.default):
            source: Any = node.args[0]
            rewrites += _drop_where_broadcast(node, source)
            if not node.users:
                ir.graph.erase_node(node)
                continue
            before, after = shape_of(source), shape_of(node)
            before = (1,) * (len(after) - len(before)) + before
            grown = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
            if len(grown) != 1 or not 2 <= after[grown[0]] <= self.max_copies:
                continue
            with ir.before(node):
                if self.multiply_floats and is_float(source):
                    copies = _copied(ir, source, after[grown[0]], after, grown[0])
                else:
                    piece = ir.reshape(source, list(before))
                    copies = ir.call(aten.cat.default, [piece] * after[grown[0]], grown[0])
                ir.replace(node, copies)
            rewrites += 1
        return rewrites + (self._repeated_cats(ir) if self.multiply_floats else 0)

    def _repeated_cats(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(aten.cat.default):
            pieces: Any = node.args[0]
            if len(pieces) < 2 or any(piece is not pieces[0] for piece in pieces) or not is_float(pieces[0]):
                continue
            shape = shape_of(node)
            axis = positive_dim(arguments(node).dim, len(shape))
            with ir.before(node):
                ir.replace(node, _copied(ir, pieces[0], len(pieces), shape, axis))
            rewrites += 1
        return rewrites


def _copied(ir: Ir, source: Node, copies: int, after: tuple[int, ...], axis: int) -> Node:
    """`copies` of `source` after each other along `axis`, which has the extent `after[axis]` then."""
    dtype = val(source).dtype
    ones = ir.add_constant("ones", torch.ones(1, copies, 1, dtype=dtype), ("ones", copies, dtype))
    flat = ir.reshape(source, [math.prod(after[:axis]), 1, math.prod(after[axis:]) // copies])
    return ir.reshape(ir.call(aten.mul.Tensor, flat, ones), list(after))


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
