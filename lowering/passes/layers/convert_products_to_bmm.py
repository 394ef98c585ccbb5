"""Products of two computed tensors as batched products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of
from mobizo_passes.graph.passes import NodePass

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvertProductsToBmm(NodePass):
    """`linear`, `mm` and `matmul` whose right factor is computed (an adapter, not a weight) become `bmm`.

    BEFORE  y = linear(h: f32[B,T,r], B: f32[o,r])           B an input
    AFTER   y = reshape(bmm(reshape(h, [1,B*T,r]), permute(reshape(B, [1,o,r]), [0,2,1])), [B,T,o])

    BEFORE  s = matmul(q: f32[N,H,T,d], k: f32[N,H,d,S])
    AFTER   s = reshape(bmm(reshape(q, [N*H,T,d]), reshape(k, [N*H,d,S])), [N,H,T,S])

    XNNPACK packs the right factor of `linear` and `mm` when it is loaded, so it must be a weight; `bmm` takes both
    factors at run time. Products with weights are left alone, as are broadcasting matmuls.
    """

    name: ClassVar[str] = "convert-products-to-bmm"
    operators = (aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default)

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        bias: Any = None
        left: Any
        right: Any
        if node.target is aten.addmm.default:
            bias, left, right = node.args[:3]
            if node.kwargs:
                return None
        else:
            left, right = node.args[:2]
            bias = arguments(node).get("bias")
        if not is_float(left) or not is_float(right):
            return None
        if node.target is aten.matmul.default and len(shape_of(right)) != 2:
            return _batched(ir, node, left, right)
        if ir.is_constant(_through_permutes(right)) or len(shape_of(right)) != 2 or len(shape_of(left)) < 2:
            return None
        rows, inner = math.prod(shape_of(left)[:-1]), shape_of(left)[-1]
        factor = ir.reshape(right, [1, *shape_of(right)])
        if node.target is aten.linear.default:
            factor = ir.call(aten.permute.default, factor, [0, 2, 1])
        product = ir.call(aten.bmm.default, ir.reshape(left, [1, rows, inner]), factor)
        result = ir.reshape(product, shape_of(node))
        return result if bias is None else ir.call(aten.add.Tensor, result, bias)


def _batched(ir: Ir, node: Node, left: Node, right: Node) -> Node | None:
    a, b = shape_of(left), shape_of(right)
    if len(a) < 3 or a[:-2] != b[:-2]:
        return None
    batch = math.prod(a[:-2])
    product = ir.call(aten.bmm.default, ir.reshape(left, [batch, *a[-2:]]), ir.reshape(right, [batch, *b[-2:]]))
    return ir.reshape(product, shape_of(node))


def _through_permutes(node: Node) -> Node:
    while node.op == "call_function" and node.target in (aten.permute.default, aten.transpose.int, aten.t.default):
        node = arguments(node).self
    return node
