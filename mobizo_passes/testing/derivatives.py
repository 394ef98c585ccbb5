"""Which operator's derivative is wrong: those of a graph's values, beside what PyTorch gives operator by operator."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from mobizo_passes.autograd import AUTOGRADS_ERROR
from mobizo_passes.errors import describe
from mobizo_passes.forward.engine import tangents
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes.linearize import SUFFIX
from mobizo_passes.reverse.engine import active_nodes, gradients
from mobizo_passes.testing.values import first_that_differs, node_values

Values = Mapping[fx.Node, Any]

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
    order = _between(ir, out, adapter)
    own = {node: run[made[node]] if node in made else torch.zeros_like(run[node]) for node in order}
    along = {node: directions[role(node).name] for node in adapter}
    found = _first(order, own, lambda values, own: _pushed(order, values, own, along), run)
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
    back = [*reversed(order), *adapter]
    own = {node: run[made[node]] for node in back}
    found = _first(back, own, lambda values, own: _pulled(back, values, own), run)
    if found is None:
        return None
    node, error = found
    users = [user for user in node.users if user in made or any(_source(each) is user for each in user.users)]
    if len(users) == 1:
        return users[0], error, f"the gradient that it hands back to %{node.name}"
    readers = ", ".join(dict.fromkeys(describe(user).partition(" in ")[0] for user in users))
    return node, error, f"the gradient of a value that several operators read ({readers})"


def _first(
    order: Sequence[fx.Node],
    own: Values,
    reference: Callable[[Values, Values], Values],
    run: Values,
) -> tuple[fx.Node, float] | None:
    """The first derivative that differs from the reference by more than rounding, as float64 shows it, explains."""
    rounded, exact = reference(run, own), reference(_wide(run), _wide(own))
    pairs = []
    for node in order:
        explained = AUTOGRADS_ERROR * _largest(rounded[node] - exact[node])
        pairs.append((node, own[node], own[node] if _largest(own[node] - exact[node]) <= explained else exact[node]))
    return first_that_differs(pairs)


def _pushed(order: Sequence[fx.Node], run: Values, own: Values, along: Values) -> Values:
    """Tangents from the adapter to the loss, each operator's by PyTorch."""
    known = {node: value.to(run[node].dtype) for node, value in along.items()}
    for node in order:
        arguments = [each for each in _source(node).all_input_nodes if each in known]
        call = _function(node, arguments, run)
        given = tuple(run[each] for each in arguments), tuple(known[each].to(run[each].dtype) for each in arguments)
        try:
            known[node] = _pushed_forward(call, *given) if arguments else torch.zeros_like(run[node])
        except _NO_DERIVATIVE:
            known[node] = own[node]
    return known


def _pulled(back: Sequence[fx.Node], run: Values, own: Values) -> Values:
    """Gradients from the loss, which comes first, back to the adapter, each operator's by PyTorch."""
    known = {back[0]: torch.ones_like(run[back[0]])}
    unknown: set[fx.Node] = set()
    for node in back:
        if node in unknown or node not in known:
            known[node] = own[node] if node in unknown else torch.zeros_like(own[node])
        if node.op != "call_function":
            continue
        arguments = [each for each in _source(node).all_input_nodes if each in own]
        leaves = [run[each].detach().requires_grad_() for each in arguments]
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                # Operators that are registered from Python are differentiated through what they consist of.
                warnings.filterwarnings("ignore", ".*an autograd kernel was not registered", UserWarning)
                result = _function(node, arguments, run)(*leaves)
                handed = torch.autograd.grad(result, leaves, known[node].to(result.dtype), allow_unused=True)
        except _NO_DERIVATIVE:
            unknown.update(arguments)
            continue
        for each, part in zip(arguments, handed, strict=True):
            if part is not None:
                known[each] = known[each] + part if each in known else part
    return known


def _wide(values: Values) -> Values:
    """Values in float64, which stand for the same numbers."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {node: tree_map(wide, value) for node, value in values.items()}


def _largest(value: Tensor) -> float:
    return float(value.abs().nan_to_num().max()) if value.numel() else 0.0


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


def _function(node: fx.Node, arguments: list[fx.Node], run: Values) -> Callable[..., Any]:
    """A value as a function of some arguments of its operator; the others are as they were."""
    source = _source(node)

    def call(*given: Tensor) -> Any:
        changed = {**run, **dict(zip(arguments, given, strict=True))}
        args, kwargs = fx.map_arg((source.args, source.kwargs), changed.__getitem__)
        result = source.target(*args, **kwargs)
        return result if source is node else result[node.args[1]]

    return call
