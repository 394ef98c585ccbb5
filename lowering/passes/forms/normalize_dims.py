"""Axes counted from the front, slices with their true end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, positive_dim, shape_of

aten = torch.ops.aten

_DIM_AT = {
    aten.softmax.int: 1,
    aten._softmax.default: 1,
    aten.log_softmax.int: 1,
    aten._log_softmax.default: 1,
    aten.gather.default: 1,
    aten.index_select.default: 1,
    aten.argmax.default: 1,
    aten.cumsum.default: 1,
}


@dataclass(frozen=True)
class NormalizeDims:
    """Positive axes and bounded slices; `transpose` becomes `permute`.

    BEFORE  cat([a, b], -1); slice(x: f32[B,T,64], 2, 32, 9223372036854775807); transpose(y: f32[B,T,H,d], 1, 2)
    AFTER   cat([a, b], 3);  slice(x, 2, 32, 64);                               permute(y, [0, 2, 1, 3])

    Nothing computes differently; delegates that read axes literally (XNNPACK's softmax and slice, QNN) are spared.
    """

    name: str = "normalize-dims"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in list(editor.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.cat.default:
                dim = arguments(node).dim
                rewrites += _set_args(node, (node.args[0], positive_dim(dim, len(shape_of(node)))))
            elif node.target is aten.slice.Tensor:
                rewrites += _set_args(node, _slice_arguments(node))
            elif node.target in (aten.transpose.int, aten.t.default):
                _to_permute(editor, node)
                rewrites += 1
            elif node.target in _DIM_AT:
                at = _DIM_AT[node.target]
                dim = node.args[at] if len(node.args) > at else None
                if isinstance(dim, int) and dim < 0:
                    rank = len(shape_of(node.args[0]))
                    rewrites += _set_args(node, (*node.args[:at], dim + rank, *node.args[at + 1 :]))
        return rewrites


def _set_args(node: Node, args: tuple[Any, ...]) -> bool:
    if tuple(node.args) == args and not (node.kwargs and node.target in (aten.cat.default, aten.slice.Tensor)):
        return False
    node.args = args
    if node.target in (aten.cat.default, aten.slice.Tensor):
        node.kwargs = {}
    return True


def _slice_arguments(node: Node) -> tuple[Any, ...]:
    shape = shape_of(node.args[0])
    dim = positive_dim(arguments(node).dim, len(shape))
    size = shape[dim]
    start = arguments(node).start
    end = arguments(node).end
    step = arguments(node).step
    start = 0 if start is None else min(start + size if start < 0 else start, size)
    end = size if end is None else min(end + size if end < 0 else end, size)
    start, end = max(start, 0), max(end, 0)
    return (node.args[0], dim, start, end) if step == 1 else (node.args[0], dim, start, end, step)


def _to_permute(editor: ProgramEditor, node: Node) -> None:
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.t.default:
        a, b = (0, 1) if rank == 2 else (0, 0)
    else:
        a, b = (positive_dim(dim, rank) for dim in (arguments(node).dim0, arguments(node).dim1))
    if rank:
        order[a], order[b] = order[b], order[a]
    with editor.before(node):
        editor.replace(node, editor.call(aten.permute.default, node.args[0], order))
