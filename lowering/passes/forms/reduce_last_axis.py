"""Reductions over the last axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, positive_dim, shape_of, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class ReduceLastAxis(Pass):
    """A float `mean` or `sum` over other axes than the last, ahead of a product, turns them to the end first.

    BEFORE  m = mean(x: f32[B,T,d], [1])                                      f32[B,d]
    AFTER   m = mean(permute(x, [0,2,1]), [-1])                               f32[B,d]

    Vulkan reduces the last axis; elsewhere a pooling in the middle of a model would cut its partition in two. What no
    product follows (the loss, the update) and reductions over all axes are left alone.
    """

    name: ClassVar[str] = "reduce-last-axis"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        leads = _ahead_of_products(ir)
        for node in ir.find(aten.mean.dim, aten.sum.dim_IntList):
            x, dims = arguments(node).self, _dims(node)
            rank = len(shape_of(x))
            same = is_float(x) and val(node).dtype == val(x).dtype
            if node not in leads or not same or not dims or len(dims) == rank or dims == [rank - 1]:
                continue
            with ir.before(node):
                ir.replace(node, _rewrite(ir, node, dims))
            rewrites += 1
        return rewrites


def _ahead_of_products(ir: Ir) -> set[Node]:
    ahead: set[Node] = set()
    for node in reversed(ir.graph.nodes):
        if any(user in ahead or node_flops(user) for user in node.users):
            ahead.add(node)
    return ahead


def _dims(node: Node) -> list[int]:
    given = arguments(node)
    return sorted(positive_dim(dim, len(shape_of(given.self))) for dim in given.dim or [])


def _rewrite(ir: Ir, node: Node, dims: list[int]) -> Node:
    x: Any = node.args[0]
    target: Any = node.target
    shape = shape_of(x)
    kept = [dim for dim in range(len(shape)) if dim not in dims]
    turned = ir.call(aten.permute.default, x, [*kept, *dims])
    flat = ir.reshape(turned, [*(shape[dim] for dim in kept), math.prod(shape[dim] for dim in dims)])
    reduced = ir.call(target, flat, [-1])
    return ir.reshape(reduced, shape_of(node))
