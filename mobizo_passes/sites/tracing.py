"""Walking a captured graph backwards and forwards through what is linear."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.sites.factors import MAPS, TRANSPOSES, literal, stored

aten = torch.ops.aten

PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
SAME = (aten.dropout.default, aten._to_copy.default, aten.clone.default, aten.neg.default)
LAYOUTS = (
    *TRANSPOSES, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten._unsafe_view.default,
)  # fmt: skip
PARTS = (
    aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, operator.getitem,
)  # fmt: skip
SUMS = (aten.add.Tensor, aten.sub.Tensor)
# A sum reaches further back than any real layer; the search stops here.
REACH = 64
# Why a low-rank path is no site that nothing is added to.
ALONE = "its output is not added to another path"

Scalings = list[float | None]


class Tracer:
    """A graph with the set of nodes that depend on the batch."""

    def __init__(self, ir: Ir) -> None:
        self.ir = ir
        self.batched = ir.reached(ir.placeholders("batch"))
        # Linear maps that stand beside a low-rank path: nobody's near miss.
        self.bases: set[fx.Node] = set()

    def scaled(self, node: fx.Node) -> tuple[fx.Node, Scalings] | None:
        """Read a node as its operand times something that does not depend on the batch."""
        if node.target in SAME:
            return node.all_input_nodes[0], [-1.0] if node.target is aten.neg.default else []
        if node.target not in (*PRODUCTS, *QUOTIENTS) or not node.all_input_nodes:
            return None
        left, right = arguments(node).self, arguments(node).other
        if (
            node.target in PRODUCTS
            and isinstance(right, fx.Node)
            and (not isinstance(left, fx.Node) or (right in self.batched and left not in self.batched))
        ):
            left, right = right, left
        if not isinstance(left, fx.Node) or right in self.batched:
            return None
        value = literal(right, self.ir.state) if isinstance(right, fx.Node) else float(right)
        if value is not None and node.target in QUOTIENTS:
            value = 1 / value if value else None
        return left, [value]

    def source(self, node: fx.Node) -> tuple[fx.Node, Scalings]:
        """Return the value that a map reads, without scalings and layouts, and those scalings."""
        scalings: Scalings = []
        while node.op == "call_function":
            step = self.scaled(node)
            if step is not None:
                node = step[0]
                scalings += step[1]
            elif node.target in LAYOUTS:
                node = node.all_input_nodes[0]
            else:
                break
        return node, scalings

    def maps(self, node: fx.Node, source: fx.Node) -> Scalings | None:
        """Search a sum's other operand for a linear map of `source`; returns the scalings of that map's input."""
        queue, seen = [node], set()
        while queue and len(seen) < REACH:
            current = queue.pop(0)
            if current in seen or current.op != "call_function":
                continue
            seen.add(current)
            if current.target in MAPS:
                x: Any = current.args[MAPS[current.target]]
                found, scalings = self.source(x)
                if found is source:
                    self.bases.add(current)
                    return scalings
                if current.target is aten.addmm.default:
                    queue.append(arguments(current).self)
            elif current.target in (*LAYOUTS, *PARTS, *SUMS, *SAME, *PRODUCTS, *QUOTIENTS):
                queue += current.all_input_nodes
        return None

    def weight(self, node: Any) -> tuple[fx.Node, bool, Scalings] | None:
        """Reduce a weight to one stored matrix: (placeholder, whether it is transposed, what it is scaled by).

        Vectors and square matrices that multiply it count as scalings without a number.
        """
        transposed, scalings = False, []
        while isinstance(node, fx.Node) and node not in self.batched:
            found = stored(node)
            if found is not None:
                return found[0], found[1] ^ transposed, scalings
            step = self.scaled(node)
            if step is not None:
                other = next((a for a in node.all_input_nodes if a is not step[0]), None)
                first = step[0] if other is None or step[0].meta["val"].dim() >= other.meta["val"].dim() else other
                node = first
                scalings += step[1]
            elif node.target in TRANSPOSES:
                node, transposed = node.args[0], not transposed
            elif node.target in (aten.matmul.default, aten.mm.default):
                left, right = node.args[:2]
                square = [a for a in (left, right) if isinstance(a, fx.Node) and _is_square(a)]
                if len(square) != 1:
                    return None
                node = left if square[0] is right else right
                scalings.append(None)
            else:
                return None
        return None

    def added(self, output: fx.Node, x: fx.Node, bias: fx.Node | None) -> tuple[Scalings, str]:
        """Follow the output to a sum with another map of the same input: the scalings passed, and what is missing."""
        source, before = self.source(x)
        miss = ALONE
        if bias is not None and bias in self.batched:
            if self.maps(bias, source) is not None:
                return [*before], ""
            miss = _not_beside(bias, source)
        queue: list[tuple[fx.Node, Scalings]] = [(output, [])]
        seen: set[fx.Node] = set()
        while queue and len(seen) < REACH:
            node, scalings = queue.pop(0)
            seen.add(node)
            for user in node.users:
                if user in seen:
                    continue
                passed = self.scaled(user)
                if user.target in SUMS and isinstance(user.args[1], fx.Node):
                    first = user.args[0] is node
                    other: Any = user.args[1] if first else user.args[0]
                    factor = weight_in_sum(user, first)
                    base = self.maps(other, source)
                    if base is not None:
                        return [*scalings, factor, *(before if base != before else [])], ""
                    miss = _not_beside(other, source)
                    queue.append((user, [*scalings, factor]))
                elif passed is not None and passed[0] is node:
                    queue.append((user, [*scalings, *passed[1]]))
                elif user.target in (*LAYOUTS, *PARTS):
                    queue.append((user, scalings))
                elif user.target is aten.addmm.default and user.args[0] is node:
                    base_x: Any = user.args[1]
                    if self.source(base_x)[0] is source:
                        return [*scalings, *before], ""
        # Without a sum, the scalings up to the next operator that is none are still the site's own.
        return self._trailing(output), miss

    def _trailing(self, node: fx.Node) -> Scalings:
        scalings: Scalings = []
        while len(node.users) == 1:
            user = next(iter(node.users))
            passed = self.scaled(user)
            if passed is None or passed[0] is not node:
                break
            scalings += passed[1]
            node = user
        return scalings


def _is_square(node: fx.Node) -> bool:
    shape = node.meta["val"].shape
    return len(shape) == 2 and shape[0] == shape[1]


def weight_in_sum(node: fx.Node, first: bool) -> float:
    """The factor that a sum, or difference, gives one of its operands."""
    if first:
        return 1.0
    alpha = arguments(node).alpha
    return -float(alpha) if node.target is aten.sub.Tensor else float(alpha)


def _not_beside(other: fx.Node, source: fx.Node) -> str:
    if other is source:
        return f"its output is added to its own input %{source.name}, not to another map of it"
    return f"its output is added to %{other.name}, which is no linear map of the same input %{source.name}"
