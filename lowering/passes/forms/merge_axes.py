"""At most four dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten

_ELEMENTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.cos.default,
    aten.sin.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.relu.default,
)


@dataclass(frozen=True)
class MergeAxes(NodePass):
    """Permutations, slices, concatenations and elementwise operations of rank 5 and more run on merged axes.

    BEFORE  y = permute(x: f32[B,T,3,H,d], [2,0,3,1,4])                                            f32[3,B,H,T,d]
    AFTER   m = permute(reshape(x, [1,B*T,3,H*d]), [0,2,1,3]);  y = reshape(permute(reshape(m, [3*B,T,H,d]), ...), ...)

    BEFORE  y = slice(x: f32[3,B,H,T,d], 0, 1, 2)
    AFTER   y = reshape(slice(reshape(x, [1,3,B*H*T*d]), 1, 1, 2), [1,B,H,T,d])

    Neighbours that stay neighbours are one axis; a permutation that needs more than four axes even so moves them into
    place one by one. Vulkan crashes beyond four dimensions. Broadcasts are left alone: they stay outside.
    """

    most: int = 4
    name: ClassVar[str] = "merge-axes"
    operators = (aten.permute.default, aten.slice.Tensor, aten.cat.default, *_ELEMENTWISE)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        if max(len(shape_of(each)) for each in (node, *node.all_input_nodes)) <= self.most:
            return None
        result = self._rewrite(ir, node)
        return None if result is None else ir.reshape(result, shape_of(node))

    def _rewrite(self, ir: Ir, node: Node) -> Node | None:
        target: Any = node.target
        shape = shape_of(node)
        if target is aten.permute.default:
            return self._permute(ir, node)
        if target in (aten.slice.Tensor, aten.cat.default):
            dim = positive_dim(arguments(node).dim, len(shape))
            if target is aten.slice.Tensor:
                return ir.call(target, _three(ir, node.args[0], dim), 1, *node.args[2:])
            pieces: Any = node.args[0]
            return ir.call(target, [_three(ir, piece, dim) for piece in pieces], 1)
        sources = [each for each in node.args if isinstance(each, Node)]
        if any(shape_of(each) != shape for each in sources):
            return None
        flat = [ir.reshape(each, [1, math.prod(shape)]) if isinstance(each, Node) else each for each in node.args]
        options: Any = node.kwargs
        return ir.call(target, *flat, **options)

    def _permute(self, ir: Ir, node: Node) -> Node:
        x: Any = node.args[0]
        shape = shape_of(x)
        order = [positive_dim(dim, len(shape)) for dim in arguments(node).dims]
        blocks: list[list[int]] = []
        for dim in (each for each in order if shape[each] != 1):
            between = range(blocks[-1][-1] + 1, dim) if blocks else range(0)
            if blocks and dim > blocks[-1][-1] and all(shape[each] == 1 for each in between):
                blocks[-1].append(dim)
            else:
                blocks.append([dim])
        sources = sorted(blocks)
        sizes = [math.prod(shape[dim] for dim in block) for block in sources]
        wanted = [sources.index(block) for block in blocks]
        if len(blocks) <= self.most:
            return ir.call(aten.permute.default, ir.reshape(x, sizes), wanted)
        return _moved(ir, x, sizes, wanted)


def _moved(ir: Ir, x: Node, sizes: list[int], wanted: list[int]) -> Node:
    """Axes brought into the wanted order one by one: what stands before, between, the axis itself, and after it."""
    present = list(range(len(sizes)))
    for place, axis in enumerate(wanted):
        at = present.index(axis)
        if at == place:
            continue
        spans = (present[:place], present[place:at], [axis], present[at + 1 :])
        parts = ir.reshape(x, [math.prod(sizes[each] for each in span) for span in spans])
        x = ir.call(aten.permute.default, parts, [0, 2, 1, 3])
        present = [*spans[0], axis, *spans[1], *spans[3]]
    return x


def _three(ir: Ir, x: Any, dim: int) -> Node:
    """`x` with all axes before `dim` as one, and all after it as one."""
    shape = shape_of(x)
    return ir.reshape(x, [math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])])
