"""Scalars multiplied into the smaller factor of a product."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleSmallerFactor(Pass):
    """A scalar times a `bmm` becomes a `bmm` of a scaled factor, when a factor is smaller than the result.

    BEFORE  y = mul(reshape(bmm(h: f32[P,B*T,r], b: f32[P,r,o]), [P*B,T,o]), 2.0)
    AFTER   y = reshape(bmm(mul(h, 2.0), b), [P*B,T,o])

    A low-rank adapter's scaling then touches r numbers a token instead of o. The product must have no other user.
    """

    name: ClassVar[str] = "scale-smaller-factor"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(aten.mul.Tensor):
            scalar = node.args[1]
            product = _product(node.args[0])
            if product is None or not isinstance(scalar, (int, float)) or not is_float(node):
                continue
            left, right = product.args
            index, factor = (0, left) if _size(left) <= _size(right) else (1, right)
            if _size(factor) >= _size(product):
                continue
            with ir.before(product):
                scaled = ir.call(aten.mul.Tensor, factor, scalar)
            product.update_arg(index, scaled)
            ir.replace(node, arguments(node).self)
            rewrites += 1
        return rewrites


def _product(node: Any) -> Node | None:
    while isinstance(node, Node) and node.target is aten.reshape.default and len(node.users) == 1:
        node = node.args[0]
    if isinstance(node, Node) and node.target is aten.bmm.default and len(node.users) == 1:
        return node
    return None


def _size(node: Any) -> int:
    return math.prod(shape_of(node))
