"""Pieces cut by slices."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of

aten = torch.ops.aten

_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.chunk.default,
    aten.unbind.int,
)


@dataclass(frozen=True)
class ConvertSplitsToSlices:
    """`split`, `chunk` and `unbind` become one `slice` for each piece that is used.

    BEFORE  p = split(x: f32[B,T,3*d], d, 2);  q = p[0];  k = p[1]
    AFTER   q = slice(x, 2, 0, d);  k = slice(x, 2, d, 2*d)

    A node with several results is one more kind of node for each delegate to know; slices all of them have.
    """

    name: str = "convert-splits-to-slices"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(*_SPLITS):
            source: Any = node.args[0]
            is_unbind = node.target is aten.unbind.int
            given = arguments(node).dim
            dim = positive_dim(given, len(shape_of(source)))
            sizes = [1 if is_unbind else int(piece.shape[dim]) for piece in node.meta["val"]]
            starts = [0, *itertools.accumulate(sizes)]
            for piece in list(node.users):
                if piece.target is operator.getitem:
                    _rewrite(editor, piece, source, dim, starts)
            if not node.users:
                editor.graph.erase_node(node)
            rewrites += 1
        return rewrites


def _rewrite(editor: ProgramEditor, piece: Node, source: Node, dim: int, starts: list[int]) -> None:
    index: Any = piece.args[1]
    index = index + len(starts) - 1 if index < 0 else index
    with editor.before(piece):
        cut = editor.call(aten.slice.Tensor, source, dim, starts[index], starts[index + 1])
        editor.replace(piece, editor.reshape(cut, list(shape_of(piece))))
