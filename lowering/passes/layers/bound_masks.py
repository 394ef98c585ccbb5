"""Masks that half precision can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

_FLOWS = (
    aten.add.Tensor,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.permute.default,
    aten.where.self,
    aten.where.ScalarSelf,
    aten.where.ScalarOther,
    aten.masked_fill.Scalar,
    aten.cat.default,
    aten.maximum.default,
)
_FILLS: dict[Any, int] = {
    aten.masked_fill.Scalar: 2,
    aten.where.ScalarSelf: 1,
    aten.where.ScalarOther: 2,
    aten.full.default: 1,
}


@dataclass(frozen=True)
class BoundMasks(Pass):
    """What a mask adds to scores, or puts in their place, before a softmax is at least `-bound`.

    BEFORE  p = _softmax(add(s: f32[N,H,T,S], mask: f32[1,1,T,S] of 0 and -3.4e38), 3)
    AFTER   p = _softmax(add(s, clamp(mask, -bound)), 3)

    BEFORE  p = _softmax(masked_fill(s, m, -inf), 3)                AFTER  p = _softmax(masked_fill(s, m, -bound), 3)

    BEFORE  p = _softmax(add(s, (m.float() - 1) * 1e9), 3)      AFTER  p = _softmax(add(s, (m.float() - 1) * bound), 3)

    A half holds numbers up to 65504: on an NPU -3.4e38 becomes -inf, and a row of it NaN. exp(-bound) is zero all the
    same, so rows with at least one position that is not masked have the same softmax. Constants alone are changed:
    masks and numbers, not scores.
    """

    bound: float = 30_000.0
    name: ClassVar[str] = "bound-masks"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in self._before_softmax(ir):
            if ir.is_constant(node) and is_float(node):
                rewrites += self._clamp(ir, node)
            elif node.target in _FILLS:
                place = _FILLS[node.target]
                value = node.args[place]
                if isinstance(value, (int, float)) and value < -self.bound and is_float(node):
                    node.update_arg(place, -self.bound)
                    rewrites += 1
            elif (factor := _scaled(node)) is not None and factor > self.bound:
                node.update_arg(1, self.bound)
                rewrites += 1
            elif node.target is aten.clamp.default and (least := arguments(node).get("min")) and least < -self.bound:
                node.update_arg(1, -self.bound)
                rewrites += 1
        return rewrites

    def _before_softmax(self, ir: Ir) -> list[Node]:
        """What flows into a softmax through additions, selections and reshapes alone."""
        found: dict[Node, None] = {}
        waiting: list[Any] = [
            node.args[0] for node in ir.find(aten._softmax.default, aten.softmax.int, aten._safe_softmax.default)
        ]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found[node] = None
            if node.op == "call_function" and node.target in _FLOWS:
                waiting.extend(source for source in node.all_input_nodes if is_float(source))
        return list(found)

    def _clamp(self, ir: Ir, node: Node) -> int:
        value = ir.constant_value(node)
        if not bool((value < -self.bound).any()):
            return 0
        readers = [user for user in node.users if user.target in _FLOWS]
        bounded = ir.add_constant("finite_mask", value.clamp_min(-self.bound), ("finite_mask", role(node).name))
        assert val(bounded).dtype == val(node).dtype
        for reader in readers:
            reader.replace_input_with(node, bounded)
        return 1


def _scaled(node: Node) -> float | None:
    """c of (m - 1) * c, m a truth value as a number: what attention written out adds to scores."""
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], (int, float)):
        return None
    less: Any = node.args[0]
    if less.target is not aten.sub.Tensor or less.args[1] != 1 or less.kwargs:
        return None
    mask: Any = less.args[0]
    held = mask.all_input_nodes if isinstance(mask, Node) and mask.op == "call_function" else []
    return float(node.args[1]) if len(held) == 1 and val(held[0]).dtype is torch.bool else None
