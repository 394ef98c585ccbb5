"""Forward mode on a graph: the tangent of each value that the adapter reaches, beside the value itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import mobizo_passes.forward.rules as _rules  # noqa: F401  (fills the table)
from mobizo_passes.forward.norms import find_norm
from mobizo_passes.forward.table import FLAT, TABLE, Linear, Own, Product, Scaled
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import with_arguments
from mobizo_passes.reverse.engine import active_nodes, refusal
from mobizo_passes.reverse.table import ELEMENTWISE, RULES, Call, NoRule
from mobizo_passes.reverse.values import Tape, Value

aten = torch.ops.aten

# Their slope is a mask: a product with it would make NaN of what the mask leaves out.
_CHOICES = frozenset({
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
})  # fmt: skip


@dataclass
class Tangent:
    """A tangent as a product of what depends on the direction and of what does not, yet to be carried out.

    The second factor is computed once, on the plain batch; only the first is there for each direction. The product may
    broadcast: it stands for the shape of the value whose tangent it is.
    """

    value: Value
    scale: Any = 1.0

    def times(self, slope: Any) -> Tangent:
        """The tangent times what does not depend on the direction."""
        return Tangent(self.value, slope * self.scale if isinstance(slope, Value) else self.scale * slope)

    def product(self) -> Value:
        """The tangent, carried out."""
        negative = isinstance(self.scale, float) and self.scale == -1.0
        self.value, self.scale = -self.value if negative else self.value * self.scale, 1.0
        return self.value


def tangent(ir: Ir, out: fx.Node, seeds: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """Write the tangent of `out` in the direction of the `seeds`, input -> its tangent; None if it does not depend.

    The nodes of each tangent stand behind the value that it belongs to. Nothing is written for values off the paths
    from the seeds to `out`. Raises `UnsupportedOp` for an operator on such a path that has no derivative.
    """
    behind = out.next
    walk = _walk(ir, out, seeds)
    with ir.graph.inserting_before(behind):
        walk.tape.like = out
        found = walk.whole(out)
    return None if found is None else found.node


def tangents(ir: Ir, out: fx.Node, seeds: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Write the tangents of all values between the seeds and `out`, as `tangent` does; value -> its tangent, if any."""
    walk = _walk(ir, out, seeds)
    found: dict[fx.Node, fx.Node] = {}
    # From the end: what stands for one tangent is part of those behind it, and stays as it is for them.
    for node in reversed(walk.tangents):
        if node in seeds:
            continue
        with ir.graph.inserting_before(ir.graph.output_node()):
            walk.tape.like = node
            whole = walk.whole(node)
        if whole is not None:
            found[node] = whole.node
    return {node: found[node] for node in reversed(found)}


def _walk(ir: Ir, out: fx.Node, seeds: Mapping[fx.Node, fx.Node]) -> _Forward:
    walk = _Forward(ir)
    walk.tangents.update({node: Tangent(Value(walk.tape, seed)) for node, seed in seeds.items()})
    active = active_nodes(out, list(seeds))
    for node in [n for n in ir.graph.nodes if n in active and n.op == "call_function"]:
        walk.push(node)
    return walk


@dataclass
class _Forward:
    ir: Ir
    tangents: dict[fx.Node, Tangent] = field(default_factory=dict)
    # The operator itself on tangents, of one with several results.
    several: dict[fx.Node, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tape = Tape(self.ir)

    def push(self, node: fx.Node) -> None:
        """Find the tangent of a node."""
        # An operator with several results is differentiated result by result.
        if not isinstance(node.meta["val"], Tensor):
            return
        source: Any = node.args[0] if node.target is operator.getitem else node
        place: Any = 0 if source is node else node.args[1]
        self.tape.like = node
        call = Call(self.tape, source, node, place)
        with self.ir.graph.inserting_before(node.next):
            try:
                found = self._tangent(call)
            except NoRule as reason:
                raise refusal(f"no derivative {reason}", source) from None
        if found is not None:
            self.tangents[node] = found

    def _tangent(self, call: Call) -> Tangent | None:
        names = [name for name, arg in call.arguments.items() if any(each in self.tangents for each in _nodes(arg))]
        target: Any = call.node.target
        if not names or target in FLAT:
            return None
        norm = find_norm(call.node)
        if norm is not None and norm.x in self.tangents:
            dx = self.whole(norm.x)
            return None if dx is None else Tangent(norm.tangent(call, dx), Value(self.tape, norm.r))
        row, back = TABLE.get(target), RULES.get(target)
        if row is None and back is not None and back.kind == ELEMENTWISE:
            return self._elementwise(call, names)
        if isinstance(row, Scaled) and names == [row.argument]:
            slope = RULES[target].rules[row.argument](call, 1.0)
            return None if call.place else self._of(call.arguments[row.argument]).times(slope)
        found: Any = None
        if isinstance(row, Linear) and set(names) <= set(row.arguments):
            found = self._linear(call, row, names)
        elif isinstance(row, Product):
            found = self._product(call, row, names)
        elif isinstance(row, Own):
            found = row.rule(call, {name: self._given(call.arguments[name]) for name in names})
        else:
            problem = "the loss depends on the adapter through an operator without a derivative"
            raise refusal(problem, call.node)
        return None if found is None else Tangent(found)

    def _elementwise(self, call: Call, names: list[str]) -> Tangent | None:
        """The sum of the arguments' tangents, each times the operator's derivative in it."""
        rules = RULES[call.node.target].rules
        slopes: dict[fx.Node, Any] = {}
        terms: list[Tangent] = []
        for name in names:
            if name not in rules:
                raise refusal(f"no derivative in the argument '{name}' of an operator", call.node)
            arg = call.arguments[name]
            if call.node.target in _CHOICES:
                chosen = rules[name](call, self._of(arg).product())
                terms.append(Tangent(chosen))
                continue
            slope = rules[name](call, 1.0)
            if slope is not None:
                slopes[arg] = slope if arg not in slopes else slopes[arg] + slope
        terms += [self._of(arg).times(slope) for arg, slope in slopes.items()]
        dtype = call.out.dtype
        for term in terms:
            if term.value.dtype != dtype:
                term.value, term.scale = term.product().to(dtype), 1.0
        if len(terms) == 1:
            return terms[0]
        total: Value | None = None
        for term in terms:
            total = term.product() if total is None else total + term.product()
        return None if total is None else Tangent(total)

    def _linear(self, call: Call, row: Linear, names: list[str]) -> Value:
        several = not isinstance(call.node.meta["val"], Tensor)
        if several and call.node in self.several:
            return self.tape.item(self.several[call.node], call.place)
        given = {name: self._given(call.arguments[name]) for name in row.arguments}
        result = self._again(call, {**given, **row.fixed})
        if several:
            self.several[call.node] = result
            return self.tape.item(result, call.place)
        return result

    def _product(self, call: Call, row: Product, names: list[str]) -> Value:
        without = {} if row.added is None or call.arguments.get(row.added) is None else {row.added: None}
        total: Value | None = None
        for name in names:
            if name == row.added:
                term = self._given(call.arguments[name])
                if len(call.out.shape) > 1 and len(call.arguments["weight"].meta["val"].shape) > 2:
                    term = term.reshape([-1, *[1] * (len(call.out.shape) - 2)])  # a bias for each channel
            else:
                term = self._again(call, {**without, name: self._given(call.arguments[name])})
            total = term if total is None else total + term
        assert total is not None
        return total if total.shape == call.out.shape else total.expand(call.out.shape)

    def _again(self, call: Call, changed: Mapping[str, Any]) -> Value:
        """The operator itself, with some arguments changed."""
        args, kwargs = with_arguments(call.node, changed)
        # A bias that was left out is no argument: `linear(x, w)`.
        while args and args[-1] is None:
            args = args[:-1]
        return self.tape.call(call.node.target, *args, **kwargs)

    def _of(self, node: fx.Node) -> Tangent:
        return Tangent(self.tangents[node].value, self.tangents[node].scale)

    def _given(self, arg: Any) -> Any:
        """The tangent of an argument, zero where it has none; of a list, one for each entry."""
        if isinstance(arg, list | tuple):
            return [self._given(each) for each in arg]
        value: Tensor = arg.meta["val"]
        found = self.whole(arg)
        return self.tape.full(tuple(value.shape), 0.0, value.dtype) if found is None else found

    def whole(self, node: fx.Node) -> Value | None:
        """The tangent of a value, carried out and of its shape; None if it has none."""
        found = self.tangents.get(node)
        return None if found is None else found.product().expand(tuple(node.meta["val"].shape))


def _nodes(arg: Any) -> list[fx.Node]:
    return [each for each in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(each, fx.Node)]
