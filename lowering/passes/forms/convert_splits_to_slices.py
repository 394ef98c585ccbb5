"""Pieces cut by slices."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of
from mobizo_passes.graph.passes import Pass, absent

aten = torch.ops.aten

SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.chunk.default,
    aten.unbind.int,
)


@dataclass(frozen=True)
class ConvertSplitsToSlices(Pass):
    """`split`, `chunk` and `unbind` become one `slice` for each piece that is used.

    BEFORE  p = split(x: f32[B,T,3*d], d, 2);  q = p[0];  k = p[1]
    AFTER   q = slice(x, 2, 0, d);  k = slice(x, 2, d, 2*d)

    A node with several results is one more kind of node for each delegate to know; slices all of them have.
    """

    name: ClassVar[str] = "convert-splits-to-slices"
    ensures = (absent(*SPLITS),)

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*SPLITS):
            source = arguments(node).self
            is_unbind = node.target is aten.unbind.int
            dim = positive_dim(arguments(node).dim, len(shape_of(source)))
            sizes = [1 if is_unbind else int(piece.shape[dim]) for piece in node.meta["val"]]
            starts = [0, *itertools.accumulate(sizes)]
            for piece in list(node.users):
                if piece.target is operator.getitem:
                    _rewrite(ir, piece, source, dim, starts)
            if not node.users:
                ir.graph.erase_node(node)
            rewrites += 1
        return rewrites


def _rewrite(ir: Ir, piece: Node, source: Node, dim: int, starts: list[int]) -> None:
    index = positive_dim(arguments(piece).index, len(starts) - 1)
    with ir.before(piece):
        cut = ir.call(aten.slice.Tensor, source, dim, starts[index], starts[index + 1])
        ir.replace(piece, ir.reshape(cut, list(shape_of(piece))))
