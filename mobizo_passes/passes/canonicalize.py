"""Remove nodes that change nothing."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.identities import ASSERTIONS, is_identity, same_type
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import FUNCTIONAL, Pass, Violation, absent

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Remove copies, casts to the same dtype, inactive dropout, assertions, same-shape views and empty parts of a
    `cat`; views become reshapes, and stored masks that index one dimension become positions.

    BEFORE  %a: f32[4, 32] = aten.clone(%x);  %b: f32[4, 32] = aten.dropout(%a, 0.1, False);  use(%b)
    AFTER   use(%x)
    """

    name: ClassVar[str] = "canonicalize"
    requires = (FUNCTIONAL,)
    ensures = (absent(*ASSERTIONS, *_VIEWS),)

    # `detach` changes no value, and ends a gradient: that of parameters, which alone are trained.
    keep_detached: bool = False

    def _kept(self, ir: Ir) -> Set[fx.Node]:
        if not self.keep_detached:
            return frozenset()
        return {n for n in ir.reached(ir.placeholders("parameter", "adapter")) if n.target is aten.detach.default}

    def unmet(self, ir: Ir) -> Iterator[Violation]:
        kept = self._kept(ir)
        goes = (node for node in ir.graph.nodes if is_identity(node) and node not in kept)
        return ((node, "a node that returns its first argument") for node in goes)

    def rewrite(self, ir: Ir) -> int:
        count, kept = 0, self._kept(ir)
        for node in list(ir.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in ASSERTIONS:
                ir.graph.erase_node(node)
                count += 1
            elif node.target in _VIEWS and not is_identity(node):
                # Copies go, so strides are no longer known: reshape copies where a view would not do.
                node.target = aten.reshape.default
                node.args = (node.args[0], list(node.meta["val"].shape))
                count += 1
            elif node.target in (aten.index.Tensor, aten.index_put.default) and (spelled := _spell_out(ir, node)):
                count += spelled
            elif node.target is aten.copy.default and same_type(node, node.args[1]):
                ir.replace(node, node.args[1])
                count += 1
            elif node.target is aten.cat.default and (gone := _drop_empty(ir, node) or _put_together(ir, node)):
                count += gone
            elif node.target is aten.broadcast_tensors.default:
                count += _take_apart(ir, node)
            elif is_identity(node) and node not in kept:
                ir.replace(node, node.args[0])
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
        spec, value = role(index), index.meta["val"]
        if spec.name in ir.state and value.dtype is torch.bool and value.dim() == 1:
            positions = ir.state[spec.name].nonzero().squeeze(1)
            indices[at] = ir.add_constant(f"{spec.name}_positions", positions)
            count += 1
    if count:
        node.args = (operands[0], indices, *operands[2:])
    return count


def _put_together(ir: Ir, node: fx.Node) -> int:
    """Replace the `cat` of all rows of a value, taken apart by `unbind`, by the value reshaped."""
    given = arguments(node)
    first, rows = given.tensors[0], [each.args for each in given.tensors if each.target is operator.getitem]
    apart = first.args[0] if first.target is operator.getitem else first
    if apart.target is not aten.unbind.int or rows != [(apart, i) for i in range(len(apart.meta["val"]))]:
        return 0
    if len(rows) != len(given.tensors) or given.dim != 0 or arguments(apart).dim != 0:
        return 0
    with ir.before(node):
        ir.replace(node, ir.reshape(arguments(apart).self, node.meta["val"].shape))
    return 1


def _drop_empty(ir: Ir, node: fx.Node) -> int:
    """Take operands of shape [0] out of a `cat` of more dimensions, which passes over them; returns how many."""
    operands: Any = node.args[0]
    kept = [each for each in operands if each.meta["val"].shape != (0,)]
    gone = len(operands) - len(kept)
    if not kept or not gone:
        return 0
    if len(kept) == 1:
        ir.replace(node, kept[0])
    else:
        node.args = (kept, *node.args[1:])
    return gone


def _take_apart(ir: Ir, node: fx.Node) -> int:
    """Turn one node with several results, as `F.mse_loss` leaves behind, into an expand per operand."""
    operands: Any = node.args[0]
    for item in list(node.users):
        at: Any = item.args[1]
        with ir.graph.inserting_before(item):
            shape = list(item.meta["val"].shape)
            same = list(operands[at].meta["val"].shape) == shape
            new = operands[at] if same else ir.call(aten.expand.default, operands[at], shape, like=node)
        ir.replace(item, new)
    ir.graph.erase_node(node)
    return 1
