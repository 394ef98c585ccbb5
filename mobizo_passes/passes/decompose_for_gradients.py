"""Write out what has intermediate results that its gradient uses again, or no rule of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._decomp import decomposition_table

from mobizo_passes.graph.inline import OperatorCall, WritesInPlace, inline, reshape_views
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, has_input, has_output
from mobizo_passes.reverse.engine import active_nodes
from mobizo_passes.reverse.forms import write_out
from mobizo_passes.reverse.rules.losses import takes
from mobizo_passes.reverse.table import RULES, Call
from mobizo_passes.reverse.values import Tape

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeForGradients(Pass):
    """Take operators between the adapter and the loss apart: attention, norms, and those without a rule.

    BEFORE  %y: f32[4, 9, 64, 64] = aten.scaled_dot_product_attention(%q, %k, %v)
    AFTER   %s: f32[4, 9, 64, 64] = aten.matmul(%q, %t);  %p = aten.softmax(%s, 3);  %y = aten.matmul(%p, %v)

    Attention with shared heads works on the heads that there are. Operators that no path from the adapter to the loss
    passes stay whole. What torch itself can take apart needs no rule.
    """

    name: ClassVar[str] = "decompose-for-gradients"
    requires = (has_output("loss", "losses"), has_input("adapter"))

    def rewrite(self, ir: Ir) -> int:
        count = 0
        end = "loss" if any(spec.kind == "loss" for spec in ir.outputs) else "losses"
        tried: set[fx.Node] = set()
        # What is taken apart may consist of what has to be.
        while True:
            active = active_nodes(ir.output_node(end), ir.placeholders("adapter"))
            todo = [n for n in ir.graph.nodes if n in active and n.op == "call_function" and n not in tried]
            made = 0
            for node in todo:
                tried.add(node)
                with ir.graph.inserting_before(node):
                    new = write_out(ir, node) or _taken_apart(ir, node)
                if new is not None:
                    node.replace_all_uses_with(new)
                    ir.graph.erase_node(node)
                    made += 1
            if not made:
                reshape_views(ir)
                return count
            count += made


def _taken_apart(ir: Ir, node: fx.Node) -> fx.Node | None:
    target: Any = node.target
    if not isinstance(node.meta["val"], torch.Tensor) or not isinstance(target, torch._ops.OpOverload):
        return None
    if target in RULES and (target is not aten.cross_entropy_loss.default or takes(Call(Tape(ir), node, node))):
        return None
    known = decomposition_table.get(target)
    if known is None and not target._can_decompose():
        return None
    call, operands = OperatorCall.of(node, known)
    # Strides are not those of the model any more, and some of torch's forms stand on them.
    operands = [_contiguous(ir, each, node) if isinstance(each, fx.Node) else each for each in operands]
    try:
        return inline(ir, call, operands, node)
    except (WritesInPlace, RuntimeError):
        # Left whole: it is refused by its own name.
        return None


def _contiguous(ir: Ir, x: fx.Node, like: fx.Node) -> fx.Node:
    value = x.meta["val"]
    if not isinstance(value, torch.Tensor) or value.is_contiguous():
        return x
    return ir.call(aten.clone.default, x, memory_format=torch.contiguous_format, like=like)
