"""Let the forward multiply what the gradient would multiply by one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.inline import call_again
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import val
from mobizo_passes.graph.passes import Pass, has_output
from mobizo_passes.passes.append_gradients import AppendGradients

MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class CombineFactors(Pass):
    """Two factors of a cotangent become one, made in the forward, where that leaves less to hold for the gradient.

    BEFORE  %h = aten.silu(%x);  %y = aten.mul(%h, %u);  …
            %t = aten.mul(%g, %u);  %s = …(%x, %h), silu's slope;  %gx = aten.mul(%t, %s);  %gu = aten.mul(%g, %h)
    AFTER   %h = aten.silu(%x);  %y = aten.mul(%h, %u);  %s = …(%x, %h);  %f = aten.mul(%u, %s);  …
            %gx = aten.mul(%g, %f);  %gu = aten.mul(%g, %h)

    Of a gated MLP, two values of its inner width are held instead of three. What the factors are made of moves to the
    forward too, if nothing else in the gradient reads it.
    """

    name: ClassVar[str] = "combine-factors"
    requires = (has_output("gradient"),)

    def rewrite(self, ir: Ir) -> int:
        nodes, known = list(ir.graph.nodes), _known(ir)
        count = 0
        for node in [each for each in ir.find(MUL) if _in_gradient(each)]:
            found = _factors(node, known)
            if found is None:
                continue
            cotangent, partial, first, second = found
            chain = _chain((first, second))
            if not _frees(chain, {partial, node}, (first, second)):
                continue
            late = max(known[first], known[second])
            with ir.graph.inserting_before(nodes[late].next):
                made = _copied(ir, chain)
                factor = ir.call(MUL, made.get(first, first), made.get(second, second), like=node)
            known |= dict.fromkeys((*made.values(), factor), late)
            node.args = (cotangent, factor)
            count += 1
        return count


def _in_gradient(node: fx.Node) -> bool:
    return facts(node).made_by == AppendGradients.name


def _known(ir: Ir) -> dict[fx.Node, int]:
    """When each value is known: the place of the last node of the forward that it is made of."""
    known: dict[fx.Node, int] = {}
    for place, node in enumerate(ir.graph.nodes):
        inputs = (known[each] for each in node.all_input_nodes)
        known[node] = max(inputs, default=-1) if _in_gradient(node) or node.op == "placeholder" else place
    return known


def _factors(node: fx.Node, known: dict[fx.Node, int]) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """Of `node`, a product of a product: the cotangent, its product with the first factor, and both factors."""
    for partial, second in _operands(node):
        if not _in_gradient(partial) or partial.target is not MUL or len(partial.users) != 1:
            continue
        for cotangent, first in _operands(partial):
            if max(known[first], known[second]) < known[cotangent]:
                return cotangent, partial, first, second
    return None


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of a product's operands, if they are two tensors of its own shape and type."""
    x, y = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return []
    same = all((val(each).shape, val(each).dtype) == (val(node).shape, val(node).dtype) for each in (x, y))
    return [(x, y), (y, x)] if same else []


def _chain(factors: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The nodes of the gradient that make the factors, in order."""
    found: set[fx.Node] = set()
    waiting = list(factors)
    while waiting:
        node = waiting.pop()
        if _in_gradient(node) and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return sorted(found)


def _frees(chain: list[fx.Node], products: set[fx.Node], factors: tuple[fx.Node, ...]) -> bool:
    """Whether the gradient no longer reads values of the forward that take more than the combined factor does."""
    moved = set(chain)
    if any(user not in moved and user not in products for node in chain for user in node.users):
        return False
    read = {each for node in chain for each in node.all_input_nodes} | set(factors)
    held = [node for node in read if node.op == "call_function" and not _in_gradient(node)]
    no_longer = (node for node in held if all(u in moved | products for u in node.users if _in_gradient(u)))
    return sum(val(node).nbytes for node in no_longer) > val(factors[0]).nbytes


def _copied(ir: Ir, chain: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The same calls at the insertion point."""
    made: dict[fx.Node, fx.Node] = {}
    for node in chain:
        made[node] = call_again(ir, node, made)
    return made
