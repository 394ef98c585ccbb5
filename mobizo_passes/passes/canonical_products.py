"""Write products with a stored matrix as they are usually written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..factors import TRANSPOSES, stored
from ..ir import Ir
from .base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class CanonicalProducts(Pass):
    """Bring products with a stored matrix to the form `matmul(x, w)`, whichever way `einsum` or the user wrote them.

    A batched product with a batch of one, a product of folded rows that are unfolded at once, a product from the left
    of transposed values, a sum of element-wise products, and a sum fused into a scaled product.

    BEFORE  %r: f32[1, 10, 6] = aten.reshape(%x, [1, 10, 6]);  %v: f32[1, 6, 3] = aten.reshape(%a, [1, 6, 3])
            %m: f32[1, 10, 3] = aten.bmm(%r, %v);  %y: f32[2, 5, 3] = aten.reshape(%m, [2, 5, 3])
    AFTER   %y: f32[2, 5, 3] = aten.matmul(%x, %a)                                            %x: f32[2, 5, 6]
    """

    name: ClassVar[str] = "canonical-products"
    requires: ClassVar[str] = "a functional graph with simplified layouts"
    ensures: ClassVar[str] = "no bmm of one stored matrix; no stored matrix on the left of transposed values"

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for node in list(ir.graph.nodes):
            for rule in (_single, _left, _scaled_sum, _unfolded, _summed):
                with ir.graph.inserting_before(node):
                    new = None if node.op != "call_function" else rule(ir, node)
                if new is not None:
                    node.replace_all_uses_with(new)
                    ir.graph.erase_node(node)
                    count += 1
                    break
        return count


def _matrix(node: Any) -> fx.Node | None:
    """Look through a leading dimension of one at a stored matrix."""
    if isinstance(node, fx.Node) and node.target in (aten.reshape.default, aten.unsqueeze.default):
        inner: Any = node.args[0]
        same = list(node.meta["val"].shape) == [1, *inner.meta["val"].shape]
        node = inner if same else None
    return node if node is not None and stored(node) is not None else None


def _single(ir: Ir, node: fx.Node) -> fx.Node | None:
    """[1, n, k] x [1, k, m] with a stored matrix -> [1, n, k] x [k, m]."""
    if node.target is not aten.bmm.default:
        return None
    a, b = node.args[:2]
    if (matrix := _matrix(b)) is not None:
        return ir.call(aten.matmul.default, a, matrix, like=node)
    if (matrix := _matrix(a)) is not None:
        flipped = ir.call(aten.permute.default, matrix, [1, 0], like=node)
        values = ir.call(aten.transpose.int, b, 1, 2, like=node)
        return ir.call(aten.transpose.int, ir.call(aten.matmul.default, values, flipped, like=node), 1, 2, like=node)
    return None


def _left(ir: Ir, node: fx.Node) -> fx.Node | None:
    """w x xᵀ -> (x wᵀ)ᵀ where the values arrive transposed: the transpositions then cancel."""
    if node.target not in (aten.matmul.default, aten.mm.default):
        return None
    w, x = node.args
    if stored(w) is None or not isinstance(x, fx.Node) or x.target not in TRANSPOSES or stored(x) is not None:
        return None
    ndim = x.meta["val"].dim()
    swapped = list(range(ndim))
    swapped[-1], swapped[-2] = swapped[-2], swapped[-1]
    order: Any = x.args[1] if x.target is aten.permute.default else swapped
    swap = {d % ndim for d in x.args[1:]} if x.target is aten.transpose.int else {ndim - 1, ndim - 2}
    if swap != {ndim - 1, ndim - 2} or [d % ndim for d in order] != swapped:
        return None
    y = ir.call(aten.matmul.default, x.args[0], ir.call(aten.permute.default, w, [1, 0], like=node), like=node)
    return ir.call(aten.transpose.int, y, -2, -1, like=node)


def _scaled_sum(ir: Ir, node: fx.Node) -> fx.Node | None:
    """addmm(c, a, w, alpha, beta) -> beta * c + alpha * (a x w)."""
    if node.target is not aten.addmm.default or not node.kwargs:
        return None
    c, a, w = node.args[:3]
    y = ir.call(aten.matmul.default, a, w, like=node)
    if (alpha := node.kwargs.get("alpha", 1)) != 1:
        y = ir.call(aten.mul.Tensor, y, alpha, like=node)
    if (beta := node.kwargs.get("beta", 1)) != 1:
        c = ir.call(aten.mul.Tensor, c, beta, like=node)
    return ir.call(aten.add.Tensor, c, y, like=node)


def _summed(ir: Ir, node: fx.Node) -> fx.Node | None:
    """sum(x[..., None, :] * w, -1) -> linear(x, w)."""
    if node.target is not aten.sum.dim_IntList or len(node.args) > 2:
        return None
    operands: list[Any] = list(node.args)
    product, dims = operands
    if product.target is not aten.mul.Tensor or len(product.users) != 1:
        return None
    ndim = product.meta["val"].dim()
    for rows, w in (product.args, reversed(product.args)):
        if stored(w) is None or not isinstance(rows, fx.Node) or rows.target is not aten.unsqueeze.default:
            continue
        x, at = rows.args
        last = [d % ndim for d in dims] == [ndim - 1]
        if last and at % ndim == ndim - 2 and rows.meta["val"].dim() == ndim:
            return ir.call(aten.linear.default, x, w, like=node)
    return None


def _unfolded(ir: Ir, node: fx.Node) -> fx.Node | None:
    """reshape(matmul(reshape(x -> [n, k]), w) -> [..., m]) -> matmul(x, w), as far as no other node reads the rows."""
    if node.target is not aten.reshape.default:
        return None
    product: Any = node.args[0]
    if product.target not in (aten.matmul.default, aten.mm.default) or len(product.users) != 1:
        return None
    rows, w = product.args
    x: Any = rows.args[0] if rows.target is aten.reshape.default else None
    if x is None or stored(w) is None:
        return None
    shape, given = list(node.meta["val"].shape), list(x.meta["val"].shape)
    if shape[:-1] != given[:-1] or given[-1] != rows.meta["val"].shape[-1] or len(given) < 2:
        return None
    return ir.call(aten.matmul.default, x, w, like=node)
