"""Reductions over the last axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.nodes import arguments, is_float, positive_dim, shape_of, val

aten = torch.ops.aten


@dataclass(frozen=True)
class ReduceLastAxis:
    """A float `mean` or `sum` over other axes than the last, ahead of a product, turns them to the end first.

    BEFORE  m = mean(x: f32[B,T,d], [1])                                      f32[B,d]
    AFTER   m = mean(permute(x, [0,2,1]), [-1])                               f32[B,d]

    Vulkan reduces the last axis; elsewhere a pooling in the middle of a model would cut its partition in two. What no
    product follows (the loss, the update) and reductions over all axes are left alone.
    """

    name: str = "reduce-last-axis"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        leads = _ahead_of_products(editor)
        for node in editor.find(aten.mean.dim, aten.sum.dim_IntList):
            dims = _dims(node)
            rank = len(shape_of(node.args[0]))
            same = is_float(node.args[0]) and val(node).dtype == val(node.args[0]).dtype
            if node not in leads or not same or not dims or len(dims) == rank or dims == [rank - 1]:
                continue
            with editor.before(node):
                editor.replace(node, _rewrite(editor, node, dims))
            rewrites += 1
        return rewrites


def _ahead_of_products(editor: ProgramEditor) -> set[Node]:
    ahead: set[Node] = set()
    for node in reversed(editor.graph.nodes):
        if any(user in ahead or node_flops(user) for user in node.users):
            ahead.add(node)
    return ahead


def _dims(node: Node) -> list[int]:
    given = arguments(node).dim or []
    return sorted(positive_dim(dim, len(shape_of(node.args[0]))) for dim in given)


def _rewrite(editor: ProgramEditor, node: Node, dims: list[int]) -> Node:
    x: Any = node.args[0]
    target: Any = node.target
    shape = shape_of(x)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    turned = editor.call(aten.permute.default, x, [*kept, *dims])
    flat = editor.reshape(turned, [*(shape[dim] for dim in kept), math.prod(shape[dim] for dim in dims)])
    reduced = editor.call(target, flat, [-1])
    return editor.reshape(reduced, list(shape_of(node)))
