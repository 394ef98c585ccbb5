"""Write products with a stored matrix as they are usually written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import FUNCTIONAL, Pass, Property, Violation
from mobizo_passes.sites.factors import TRANSPOSES, stored

aten = torch.ops.aten


def _batched(ir: Ir) -> Iterator[Violation]:
    return ((n, "one") for n in ir.find(aten.bmm.default) if any(_matrix(each) is not None for each in n.args))


@dataclass(frozen=True)
class CanonicalizeProducts(Pass):
    """Bring products with a stored matrix to the form `matmul(x, w)`, whichever way `einsum` or the user wrote them.

    A batched product with a batch of one, a product of folded rows that are unfolded at once, a product from the left
    of transposed values, a sum of element-wise products, an outer product with a matrix of one row or column, and a sum
    fused into a scaled product.

    BEFORE  %r: f32[1, 10, 6] = aten.reshape(%x, [1, 10, 6]);  %v: f32[1, 6, 3] = aten.reshape(%a, [1, 6, 3])
            %m: f32[1, 10, 3] = aten.bmm(%r, %v);  %y: f32[2, 5, 3] = aten.reshape(%m, [2, 5, 3])
    AFTER   %y: f32[2, 5, 3] = aten.matmul(%x, %a)                                            %x: f32[2, 5, 6]
    """

    name: ClassVar[str] = "canonicalize-products"
    requires = (FUNCTIONAL,)
    ensures = (Property("no product of batches with one stored matrix", _batched),)

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for node in list(ir.graph.nodes):
            for rule in (_single, _left, _scaled_sum, _unfolded, _summed, _outer):
                with ir.graph.inserting_before(node):
                    new = None if node.op != "call_function" else rule(ir, node)
                if new is not None:
                    ir.replace(node, new)
                    count += 1
                    break
        return count


def _matrix(node: Any) -> tuple[fx.Node, bool] | None:
    """Look through dimensions of one at a stored matrix: (it, whether a reshape transposed its one row or column)."""
    swapped = False
    if isinstance(node, fx.Node) and node.target in (aten.reshape.default, aten.unsqueeze.default):
        inner: Any = node.args[0]
        made, given = list(node.meta["val"].shape), list(inner.meta["val"].shape)
        ones = len(made) - 2
        if len(given) != 2 or made[:ones] != [1] * ones or (made[ones:] != given and 1 not in given):
            return None
        node, swapped = inner, made[ones:] != given
    return (node, swapped) if isinstance(node, fx.Node) and stored(node) is not None else None


def _oriented(ir: Ir, matrix: fx.Node, transpose: bool, like: fx.Node) -> fx.Node:
    return ir.call(aten.permute.default, matrix, [1, 0], like=like) if transpose else matrix


def _single(ir: Ir, node: fx.Node) -> fx.Node | None:
    """[1, n, k] x [1, k, m] with a stored matrix -> [1, n, k] x [k, m]."""
    if node.target is not aten.bmm.default:
        return None
    a, b = node.args[:2]
    if (found := _matrix(b)) is not None:
        return ir.call(aten.matmul.default, a, _oriented(ir, *found, node), like=node)
    if (found := _matrix(a)) is not None:
        flipped = _oriented(ir, found[0], not found[1], node)
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
    given = arguments(node)
    c, a, w = given.self, given.mat1, given.mat2
    y = ir.call(aten.matmul.default, a, w, like=node)
    if given.alpha != 1:
        y = ir.call(aten.mul.Tensor, y, given.alpha, like=node)
    if given.beta != 1:
        c = ir.call(aten.mul.Tensor, c, given.beta, like=node)
    return ir.call(aten.add.Tensor, c, y, like=node)


def _summed(ir: Ir, node: fx.Node) -> fx.Node | None:
    """sum(x[..., None, :] * w, -1) -> linear(x, w)."""
    if node.target is not aten.sum.dim_IntList or arguments(node).keepdim:
        return None
    product, dims = arguments(node).self, arguments(node).dim
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
    if given[-1] != rows.meta["val"].shape[-1] or len(given) < 2:
        return None
    straight = [*given[:-1], product.meta["val"].shape[-1]]
    ones = len(shape) - len(straight)
    if ones < 0 or shape != straight + [1] * ones:
        return None
    y = ir.call(aten.matmul.default, x, w, like=node)
    return ir.call(aten.reshape.default, y, shape, like=node) if ones else y


def _outer(ir: Ir, node: fx.Node) -> fx.Node | None:
    """reshape(x[..., 1, 1] * w[n, 1] -> [..., n]) -> matmul(x[..., 1], w): einsum writes products of rank one so."""
    if node.target is not aten.reshape.default:
        return None
    product: Any = node.args[0]
    if product.target is not aten.mul.Tensor or len(product.users) != 1:
        return None
    *lead, n = node.meta["val"].shape
    for x, w in (product.args, reversed(product.args)):
        matrix: Any = w.args[0] if isinstance(w, fx.Node) and w.target is aten.reshape.default else w
        if stored(matrix) is None or not isinstance(x, fx.Node) or stored(x) is not None:
            continue
        values, weight = x.meta["val"], w.meta["val"]
        if n == 1 or max(weight.shape) != n or weight.numel() != n or values.numel() * n != node.meta["val"].numel():
            continue
        # The stored values are innermost where x has nothing but ones beside and behind them.
        behind = list(reversed(weight.shape)).index(n) + 1
        if any(d != 1 for d in values.shape[-behind:]):
            continue
        inner: Any = x.args[0] if x.target is aten.reshape.default else x
        if list(inner.meta["val"].shape) != [*lead, 1]:
            inner = ir.call(aten.reshape.default, x, [*lead, 1], like=node)
        return ir.call(
            aten.matmul.default, inner, _oriented(ir, matrix, matrix.meta["val"].shape[0] != 1, node), like=node
        )
    return None
