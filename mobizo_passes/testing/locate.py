"""Which node makes a step differ from the reference: the passes are run again, one by one, and values are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mobizo_passes import pipelines, reference
from mobizo_passes.autograd import LOSS_TOLERANCE
from mobizo_passes.batching import Layout
from mobizo_passes.capture.inputs import bind_inputs
from mobizo_passes.errors import describe
from mobizo_passes.graph import ops
from mobizo_passes.graph.facts import source_of
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.graph.passes import Pass
from mobizo_passes.passes import AppendGradients, ExpandPerturbations, Linearize
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.program import TrainingProgram
from mobizo_passes.testing.derivatives import wrong_gradient, wrong_tangent
from mobizo_passes.testing.values import first_that_differs, node_values, relative_error
from mobizo_passes.transform import only
from mobizo_passes.zo.estimators import Exact


@dataclass(frozen=True)
class Difference:
    """The first value, in the order of the graph, that a pass has changed; its text is what a failure shows.

    `node`: of the graph after the pass, None if the graph was wrong as it was captured; for a derivative, the operator
    that it is of. `group`: the perturbed copy of the batch. `error`: the largest difference, relative to the largest
    entry. `what` differs, if it is no value: a derivative.
    """

    stage: str
    node: fx.Node | None
    group: int
    error: float
    what: str = ""

    def __str__(self) -> str:
        if self.node is None:
            return f"first difference: {self.stage}, in group {self.group}, {_amount(self.error)}"
        source = source_of(self.node)
        return (
            f"first difference: after {self.stage}, {self.what or f'in group {self.group}'}, {_amount(self.error)}:\n"
            f"  {describe(self.node)}" + (f"\n    {source}" if source else "")
        )


@neutral()
def first_difference(
    program: TrainingProgram,
    model: nn.Module,
    example_inputs: Any,
    *,
    adapter: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    eps: float = 1e-2,
    batch_dim: int = 0,
) -> Difference | None:
    """Return the first node of the step whose value is not what the model gives for one perturbed copy at a time.

    From the captured model on, each pass runs again. Before the groups stand side by side, values are compared node by
    node, by name, with those before the pass; after it, the part of each value that belongs to a group, with the value
    that the unexpanded graph gives with that group's adapter. Derivatives are compared with what PyTorch gives operator
    by operator: tangents along the first query's direction, or gradients from the loss back. Arguments are those of
    `verify`; `batch_dim` is that of `transform`. None if all agree: then what follows differs, up to the update.
    """
    batch = bind_inputs(program.inputs, example_inputs)
    adapter = program.initial_adapter() if adapter is None else adapter
    scalars = {"seed": torch.tensor([seed]), "eps": torch.tensor([eps])}
    moved = _moved(program, adapter, seed, eps)
    ir = only(program.captured, "loss")
    losses = [_loss(ir, {**one, **batch}) for one in moved]
    eager = [reference.loss_of(model, example_inputs, one, program.loss_fn) for one in moved]
    group, error = _worst(losses, eager)
    if error > LOSS_TOLERANCE:
        return Difference("the loss of the captured model, beside the model's own", None, group, error)
    for one in _passes(program, ir, batch_dim):
        before = ir.clone()
        if isinstance(one, ExpandPerturbations):
            return _expanded(one, before, adapter, moved, batch, scalars)
        if isinstance(one, Linearize):
            z = reference.draw(adapter, seed, program.estimator.queries, program.noise)
            return _derivative(one, wrong_tangent(before, {**adapter, **batch}, {fqn: z[fqn][0] for fqn in adapter}))
        if isinstance(one, AppendGradients):
            return _derivative(one, wrong_gradient(before, {**adapter, **batch}))
        one(ir)
        group, error = _worst([_loss(ir, {**each, **batch, **scalars}) for each in moved], losses)
        if error > LOSS_TOLERANCE:
            inputs = {**moved[group], **batch, **scalars}
            expected, found = _by_name(node_values(before, inputs)[0]), node_values(ir, inputs)[0]
            pairs = ((node, found[node], expected[node.name]) for node in found if node.name in expected)
            node, error = first_that_differs(pairs) or (ir.output_node(ir.outputs[0].kind), error)
            return Difference(one.name, node, group, error)
    return None


def _derivative(one: Pass, found: tuple[fx.Node, float, str] | None) -> Difference | None:
    return None if found is None else Difference(one.name, found[0], 0, *found[1:])


def _amount(error: float) -> str:
    return f"off by {error:.2g} of the largest entry" if math.isfinite(error) else "not finite, or not computed at all"


def _passes(program: TrainingProgram, ir: Ir, batch_dim: int) -> Iterator[Pass]:
    """Yield the passes up to that which lets the groups stand side by side, each to be run before the next is asked."""
    yield from pipelines.evaluate(program.labels["max_labels"])
    if isinstance(program.estimator, Exact):
        yield from pipelines.gradients(program.estimator)
    for one in pipelines.step(program.estimator, program.noise, batch_of(ir, batch_dim), batch_dim, program.optimizer):
        if any(spec.kind not in ("loss", "losses") for spec in ir.outputs):
            return
        yield one


def _moved(program: TrainingProgram, adapter: Mapping[str, Tensor], seed: int, eps: float) -> list[dict[str, Tensor]]:
    """The adapter of each group."""
    estimator = program.estimator
    if not estimator.uses_epsilon:
        return [dict(adapter)]
    z = reference.draw(adapter, seed, estimator.queries, program.noise)
    return [
        {fqn: value + factor * eps * z[fqn][query] for fqn, value in adapter.items()}
        for query, factor in estimator.offsets
    ]


def _expanded(
    one: ExpandPerturbations,
    before: Ir,
    adapter: Mapping[str, Tensor],
    moved: list[dict[str, Tensor]],
    batch: Mapping[str, Tensor],
    scalars: Mapping[str, Tensor],
) -> Difference | None:
    """Hold the expanded graph against the one before it, in the group whose loss differs most."""
    ir = before.clone()
    ir.pass_name = one.name
    walk, _ = one.expand(ir)
    ir.lint()
    found, failed = node_values(ir, {**adapter, **batch, **scalars})
    group, error = 0, math.inf
    if failed is None:
        losses = [_loss(before, {**each, **batch, **scalars}) for each in moved]
        group, error = _worst(list(found[ir.output_node("losses")]), losses)
    if error <= LOSS_TOLERANCE:
        return None
    expected = _by_name(node_values(before, {**moved[group], **batch, **scalars})[0])

    def pairs() -> Iterator[tuple[fx.Node, Any, Any]]:
        for node, value in found.items():
            perturbs = node.target is torch.ops.mobizo.perturb.default
            name = node.all_input_nodes[0].name if perturbs else walk.replaced.get(node, node.name)
            layout = walk.layouts.get(node)
            if name not in expected or isinstance(layout, tuple):
                continue
            if isinstance(layout, Layout):
                value = ops.ungroup(value, len(moved), layout.dim, layout.outer)
            if layout is not None:
                yield node, value[group], expected[name]
            elif node.op == "call_function":  # computed once: the same in all groups
                yield node, value, expected[name]

    node, error = first_that_differs(pairs()) or (failed or ir.output_node("losses"), error)
    return Difference(one.name, node, group, error)


def _by_name(values: Mapping[fx.Node, Any]) -> dict[str, Any]:
    return {node.name: value for node, value in values.items()}


def _loss(ir: Ir, inputs: Mapping[str, Tensor]) -> Tensor:
    out = ir.run(inputs)
    return (out["losses"] if "losses" in out else out["loss"]).mean()


def _worst(found: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[int, float]:
    """The group whose loss differs most, and by how much, relative to the loss where that is above one."""
    errors = [relative_error(a, b, floor=1.0) for a, b in zip(found, expected, strict=True)]
    return max(enumerate(errors), key=lambda pair: pair[1])
