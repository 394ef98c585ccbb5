"""Compute with numbers one by one that were stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import FUNCTIONAL, NodePass

aten = torch.ops.aten

_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim)
_PRODUCTS = (aten.dot.default, aten.matmul.default)


@dataclass(frozen=True)
class UnstackNumbers(NodePass):
    """Add up a list of losses one by one, as if it had not been stacked: weighted, averaged or as it is.

    BEFORE  %s: f32[2] = aten.stack([%a, %b]);  %m: f32[2] = aten.mul(%s, %w);  %l: f32[] = aten.sum(%m)
    AFTER   %p: f32[] = aten.mul(%a, aten.select(%w, 0, 0));  %q: f32[] = aten.mul(%b, aten.select(%w, 0, 1))
            %l: f32[] = aten.add(%p, %q)
    """

    name: ClassVar[str] = "unstack-numbers"
    requires = (FUNCTIONAL,)
    operators: ClassVar[Sequence[Any]] = (*_SUMS, *_PRODUCTS, aten.select.int)

    def replacement(self, ir: Ir, node: fx.Node) -> fx.Node | None:
        given = list(node.args)
        if _dims(node) != 0 or node.kwargs or not any(map(self._stack, node.all_input_nodes)):
            return None
        parts = _numbers(ir, given[0], node)
        if node.target is aten.select.int:
            return None if parts is None else parts[arguments(node).index]
        if node.target in _PRODUCTS:
            others = _numbers(ir, given[1], node)
            if parts is None or others is None:
                return None
            parts = [ir.call(aten.mul.Tensor, a, b, like=node) for a, b in zip(parts, others, strict=True)]
        if parts is None:
            return None
        total = parts[0]
        for each in parts[1:]:
            total = ir.call(aten.add.Tensor, total, each, like=node)
        if node.target in (aten.mean.default, aten.mean.dim):
            return ir.call(aten.div.Tensor, total, len(parts), like=node)
        return total

    def _stack(self, node: fx.Node) -> bool:
        """Whether a value [k] is made of numbers that were stacked, and can be computed one by one."""
        if node.op != "call_function" or _dims(node) != 1:
            return False
        return node.target is aten.stack.default or (_apart(node) and any(map(self._stack, node.all_input_nodes)))


def _dims(node: Any) -> int:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _apart(node: fx.Node) -> bool:
    """Whether each element of a value [k] comes from numbers, and from elements at the same place."""
    shapes = ((), node.meta["val"].shape)
    fits = all(_dims(each) >= 0 and each.meta["val"].shape in shapes for each in node.all_input_nodes)
    return fits and torch.Tag.pointwise in getattr(node.target, "tags", ())


def _numbers(ir: Ir, node: Any, like: fx.Node) -> list[fx.Node] | None:
    """The numbers that a value [k] consists of; None for anything else than a value of one dimension."""
    if _dims(node) != 1:
        return None
    if node.target is aten.stack.default:
        return list(arguments(node).tensors)
    count = node.meta["val"].shape[0]
    target: Any = node.target
    if node.op == "call_function" and _apart(node):
        apart = {each: _numbers(ir, each, like) for each in node.all_input_nodes}
        results = []
        for i in range(count):
            at = {each: each if parts is None else parts[i] for each, parts in apart.items()}
            args, kwargs = fx.map_arg((node.args, node.kwargs), at.__getitem__)
            results.append(ir.call(target, *args, like=node, **kwargs))
        return results
    return [ir.call(aten.select.int, node, 0, i, like=like) for i in range(count)]
