"""Write out what has no batching rule of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._decomp import decomposition_table

from mobizo_passes.batching import RULES
from mobizo_passes.batching.parts import PARTS
from mobizo_passes.graph.fold_constants import FoldConstants
from mobizo_passes.graph.inline import OperatorCall, WritesInPlace, reshape_views, take_apart, trace
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, has_input

aten = torch.ops.aten

# What torch 2.13 takes apart wrongly: where no class is a target, the loss is not zero.
_WRONG = (aten.multilabel_margin_loss_forward.default,)


@dataclass(frozen=True)
class DecomposeForBatching(Pass):
    """Take operators that the adapter reaches apart, where they have no batching rule and what they consist of does.

    BEFORE  %y: f32[4, 3, 8, 8] = aten.reflection_pad2d(%x, [1, 1, 1, 1])
    AFTER   %y: f32[4, 3, 8, 8] = aten.index(%x, [None, None, %rows, %columns])

    An operator with parts that have no rule either stays whole: it is refused by its own name.
    """

    name: ClassVar[str] = "decompose-for-batching"
    requires = (has_input("adapter"),)

    def rewrite(self, ir: Ir) -> int:
        reached = ir.reached(ir.placeholders("adapter"))
        todo = [node for node in ir.graph.nodes if node in reached and _apart(node, reached)]
        for node in todo:
            take_apart(ir, node, _table())
        reshape_views(ir)
        if todo:
            # Positions, which no operand has a part in.
            FoldConstants().rewrite(ir)
        return len(todo)


def _apart(node: fx.Node, reached: Set[fx.Node]) -> bool:
    if node.op != "call_function" or node.target not in _table():
        return False
    if _ruled(node.target) and not _by_mask(node, reached):
        return False
    call, operands = OperatorCall.of(node)
    try:
        parts = trace(call, operands, _table())
    except (WritesInPlace, RuntimeError, NotImplementedError, ValueError):
        return False
    # What reads none of the operands, such as positions, is the same for all groups.
    reads = set(parts.graph.find_nodes(op="placeholder"))
    for part in parts.graph.nodes:
        if part.op == "call_function" and not reads.isdisjoint(part.all_input_nodes):
            reads.add(part)
            if not _ruled(part.target):
                return False
    return True


def _by_mask(node: fx.Node, reached: Set[fx.Node]) -> bool:
    """Whether values are written where a mask is true that is the same for all groups."""
    masks: Any = [node.args[1]] if node.target is aten.masked_scatter.default else []
    if node.target is aten.index_put.default:
        masks = node.args[1]
    return len(masks) == 1 and masks[0] not in reached and masks[0].meta["val"].dtype is torch.bool


def _ruled(target: Any) -> bool:
    return target in RULES or not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise in target.tags


@functools.cache
def _table() -> Mapping[Any, Callable[..., Any]]:
    """What torch can take apart, for the operators without a rule."""
    known = {op: parts for op, parts in decomposition_table.items() if not _ruled(op) and op.namespace == "aten"}
    return {op: parts for op, parts in {**known, **PARTS}.items() if op not in _WRONG}
