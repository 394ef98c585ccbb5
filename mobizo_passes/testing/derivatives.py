"""Which operator's derivative is wrong: those of a graph's values, beside what PyTorch gives operator by operator."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from mobizo_passes.errors import describe
from mobizo_passes.forward.engine import tangents
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes.linearize import SUFFIX
from mobizo_passes.reverse.engine import active_nodes, gradients
from mobizo_passes.testing.values import first_that_differs, node_values

# What PyTorch raises for an operator that it has no derivative of.
_NO_DERIVATIVE = (RuntimeError, NotImplementedError)


def wrong_tangent(
    before: Ir, inputs: Mapping[str, Tensor], directions: Mapping[str, Tensor]
) -> tuple[fx.Node, float, str] | None:
    """Return the first operator, in the order of a loss's graph, whose tangent is not PyTorch's, and by how much.

    Each is held against PyTorch's, of the operator alone, given the tangents of its arguments: what an operator gets
    wrong is not passed on. An operator that PyTorch can't differentiate forward is taken to be right.

    Args:
        inputs: adapter and batch, by name.
        directions: FQN -> tensor, the tangents of the adapter.
    """
    ir = before.clone()
    out = ir.output_node("losses")
    adapter = ir.placeholders("adapter")
    seeds = {node: ir.add_input("tangent", role(node).name + SUFFIX, node.meta["val"]) for node in adapter}
    made = tangents(ir, out, seeds)
    run, _ = node_values(ir, {**inputs, **{fqn + SUFFIX: value for fqn, value in directions.items()}})
    known: dict[fx.Node, Tensor] = {node: directions[role(node).name] for node in adapter}
    pairs: list[tuple[fx.Node, Tensor, Tensor]] = []
    for node in _between(ir, out, adapter):
        call, arguments = _function(node, [each for each in _source(node).all_input_nodes if each in known], run)
        zero = torch.zeros_like(run[node])
        own = run[made[node]] if node in made else zero
        given = tuple(run[each] for each in arguments), tuple(known[each] for each in arguments)
        try:
            known[node] = _pushed_forward(call, *given) if arguments else zero
        except _NO_DERIVATIVE:
            known[node] = own
        pairs.append((node, own, known[node]))
    found = first_that_differs(pairs)
    return None if found is None else (*found, "the tangent in the first direction")


def wrong_gradient(before: Ir, inputs: Mapping[str, Tensor]) -> tuple[fx.Node, float, str] | None:
    """Return the last operator, in the order of a loss's graph, that hands back a gradient that is not PyTorch's.

    Gradients are followed from the loss back, each operator's alone, given that of its result; see `wrong_tangent`. A
    value that several operators read has the sum of what they hand back: then it stands for them.
    """
    ir = before.clone()
    loss, adapter = ir.output_node("loss"), ir.placeholders("adapter")
    order = _between(ir, loss, adapter)
    with ir.graph.inserting_before(ir.graph.output_node()):
        made = dict(zip([*adapter, *order], gradients(ir, loss, [*adapter, *order]), strict=True))
    run, _ = node_values(ir, inputs)
    known: dict[fx.Node, Tensor] = {loss: torch.ones_like(run[loss])}
    unknown: set[fx.Node] = set()
    pairs: list[tuple[fx.Node, Tensor, Tensor]] = []
    for node in [*reversed(order), *adapter]:
        own = run[made[node]]
        expected = own if node in unknown else known.get(node, torch.zeros_like(own))
        pairs.append((node, own, expected))
        if node.op != "call_function":
            continue
        call, arguments = _function(node, [each for each in _source(node).all_input_nodes if each in made], run)
        leaves = [run[each].detach().requires_grad_() for each in arguments]
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                # Operators that are registered from Python are differentiated through what they consist of.
                warnings.filterwarnings("ignore", ".*an autograd kernel was not registered", UserWarning)
                handed = torch.autograd.grad(call(*leaves), leaves, expected, allow_unused=True)
        except _NO_DERIVATIVE:
            unknown.update(arguments)
            continue
        for each, part in zip(arguments, handed, strict=True):
            if part is not None:
                known[each] = known[each] + part if each in known else part
    found = first_that_differs(pairs)
    if found is None:
        return None
    node, error = found
    users = [user for user in node.users if user in made or any(each in made for each in user.users)]
    if len(users) == 1:
        return users[0], error, f"the gradient that it hands back to %{node.name}"
    readers = ", ".join(dict.fromkeys(describe(user).partition(" in ")[0] for user in users))
    return node, error, f"the gradient of a value that several operators read ({readers})"


def _pushed_forward(call: Callable[..., Tensor], values: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    # `torch.func.jvp` would take operators that are registered from Python for constants.
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(call(*map(forward_ad.make_dual, values, along))).tangent
    if found is None:
        raise NotImplementedError("an operator without a derivative")
    return found


def _between(ir: Ir, out: fx.Node, wrt: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls on the way to `out` that give one tensor, in order."""
    active = active_nodes(out, wrt)
    calls = (node for node in ir.graph.nodes if node in active and node.op == "call_function")
    return [node for node in calls if isinstance(node.meta["val"], Tensor)]


def _source(node: fx.Node) -> Any:
    """The operator of a value: of one among several results, the one that gives them all."""
    return node.args[0] if node.target is operator.getitem else node


def _function(
    node: fx.Node, arguments: list[fx.Node], run: Mapping[fx.Node, Any]
) -> tuple[Callable[..., Any], list[fx.Node]]:
    """A value as a function of some arguments of its operator; the others are as they were."""
    source = _source(node)

    def call(*given: Tensor) -> Any:
        changed = {**run, **dict(zip(arguments, given, strict=True))}
        args, kwargs = fx.map_arg((source.args, source.kwargs), changed.__getitem__)
        result = source.target(*args, **kwargs)
        return result if source is node else result[node.args[1]]

    return call, arguments
