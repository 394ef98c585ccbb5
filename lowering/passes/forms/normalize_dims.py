"""Axes counted from the front, slices with their true end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim, set_arguments, shape_of
from mobizo_passes.graph.passes import Pass, Property, Violation, absent

aten = torch.ops.aten

_ALONG = (
    aten.cat.default,
    aten.slice.Tensor,
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.gather.default,
    aten.index_select.default,
    aten.argmax.default,
    aten.cumsum.default,
)
_SWAPS = (aten.transpose.int, aten.t.default)


def _from_the_end(ir: Ir) -> Iterator[Violation]:
    dims = ((node, arguments(node).dim) for node in ir.find(*_ALONG))
    return ((node, str(dim)) for node, dim in dims if dim is not None and dim < 0)


@dataclass(frozen=True)
class NormalizeDims(Pass):
    """Positive axes and bounded slices; `transpose` becomes `permute`.

    BEFORE  cat([a, b], -1); slice(x: f32[B,T,64], 2, 32, 9223372036854775807); transpose(y: f32[B,T,H,d], 1, 2)
    AFTER   cat([a, b], 3);  slice(x, 2, 32, 64);                               permute(y, [0, 2, 1, 3])

    Nothing computes differently; delegates that read axes literally (XNNPACK's softmax and slice, QNN) are spared.
    """

    name: ClassVar[str] = "normalize-dims"
    ensures = (absent(*_SWAPS), Property("axes counted from the front", _from_the_end))

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*_ALONG):
            before = node.args, node.kwargs
            given = arguments(node)
            if node.target is aten.slice.Tensor:
                node.args, node.kwargs = _slice_arguments(node), {}
            elif node.target is aten.cat.default:
                node.args, node.kwargs = (given.tensors, positive_dim(given.dim, len(shape_of(node)))), {}
            elif given.dim is not None:
                set_arguments(node, dim=positive_dim(given.dim, len(shape_of(given.self))))
            rewrites += (node.args, node.kwargs) != before
        for node in ir.find(*_SWAPS):
            with ir.before(node):
                ir.replace(node, ir.call(aten.permute.default, arguments(node).self, _order(node)))
            rewrites += 1
        return rewrites


def _slice_arguments(node: Node) -> tuple[Any, ...]:
    given = arguments(node)
    shape = shape_of(given.self)
    dim = positive_dim(given.dim, len(shape))
    size = shape[dim]
    start, end = 0 if given.start is None else given.start, size if given.end is None else given.end
    start, end = (max(min(at + size if at < 0 else at, size), 0) for at in (start, end))
    return (given.self, dim, start, end) if given.step == 1 else (given.self, dim, start, end, given.step)


def _order(node: Node) -> list[int]:
    order = list(range(len(shape_of(node))))
    given = arguments(node)
    a, b = (0, -1) if node.target is aten.t.default else (given.dim0, given.dim1)
    if order:
        order[a], order[b] = order[b], order[a]
    return order
