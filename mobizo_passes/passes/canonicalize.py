"""Remove nodes that change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.passes.base import Pass

aten = torch.ops.aten

_ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove copies, casts to the same dtype, inactive dropout, assertions and same-shape views; views become reshapes,
    and stored masks that index one dimension become positions.

    BEFORE  %a: f32[4, 32] = aten.clone(%x);  %b: f32[4, 32] = aten.dropout(%a, 0.1, False);  use(%b)
    AFTER   use(%x)
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[str] = "a functional graph"
    ensures: ClassVar[str] = "no node that returns its first argument unchanged"

    # `detach` changes no value, and ends a gradient.
    keep_detached: bool = False

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for node in list(ir.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in _ASSERTIONS:
                ir.graph.erase_node(node)
                count += 1
            elif node.target in _VIEWS and not _is_identity(node):
                # Copies go, so strides are no longer known: reshape copies where a view would not do.
                node.target = aten.reshape.default
                node.args = (node.args[0], list(node.meta["val"].shape))
                count += 1
            elif node.target in (aten.index.Tensor, aten.index_put.default) and (spelled := _spell_out(ir, node)):
                count += spelled
            elif node.target is aten.broadcast_tensors.default:
                count += _take_apart(ir, node)
            elif _is_identity(node) and not (self.keep_detached and node.target is aten.detach.default):
                node.replace_all_uses_with(node.args[0])
                ir.graph.erase_node(node)
                count += 1
        return count


def _spell_out(ir: Ir, node: fx.Node) -> int:
    """Replace stored masks of one dimension in an index by the positions that they select; returns how many."""
    operands: list[Any] = list(node.args)
    indices = list(operands[1])
    count = 0
    for at, index in enumerate(indices):
        if not isinstance(index, fx.Node) or index.op != "placeholder":
            continue
        spec, value = index.meta["input"], index.meta["val"]
        if spec.name in ir.state and value.dtype is torch.bool and value.dim() == 1:
            positions = ir.state[spec.name].nonzero().squeeze(1)
            indices[at] = ir.add_constant(f"{spec.name}_positions", positions)
            count += 1
    if count:
        node.args = (operands[0], indices, *operands[2:])
    return count


def _take_apart(ir: Ir, node: fx.Node) -> int:
    """Turn one node with several results, as `F.mse_loss` leaves behind, into an expand per operand."""
    operands: Any = node.args[0]
    for item in list(node.users):
        at: Any = item.args[1]
        with ir.graph.inserting_before(item):
            shape = list(item.meta["val"].shape)
            same = list(operands[at].meta["val"].shape) == shape
            new = operands[at] if same else ir.call(aten.expand.default, operands[at], shape, like=node)
        item.replace_all_uses_with(new)
        ir.graph.erase_node(item)
    ir.graph.erase_node(node)
    return 1


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in _COPIES:
        return True
    if node.target is aten.dropout.default:
        return not arguments(node).train
    before, after = node.args[0].meta["val"], node.meta["val"]
    if node.target in (aten._to_copy.default, aten.type_as.default):
        return before.dtype == after.dtype
    return node.target in (aten.view.default, aten.reshape.default, aten.expand.default) and before.shape == after.shape
