"""Which node makes a step differ from the reference: the passes are run again, one by one, and values are compared."""

from __future__ import annotations

import contextlib
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
from mobizo_passes.graph.facts import role, source_of
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.graph.passes import Pass
from mobizo_passes.passes import ExpandPerturbations
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.program import TrainingProgram
from mobizo_passes.transform import only

# Relative errors above which a value differs. What is wrong seldom shows as little as rounding does, so the first node
# above the largest bound that any node is above is the one.
_BOUNDS = (1e-2, 1e-3, 1e-4, LOSS_TOLERANCE)


@dataclass(frozen=True)
class Difference:
    """The first value, in the order of the graph, that a pass has changed; its text is what a failure shows.

    `node`: of the graph after the pass, None if the graph was wrong as it was captured. `group`: the perturbed copy of
    the batch. `error`: the largest difference, relative to the largest entry.
    """

    stage: str
    node: fx.Node | None
    group: int
    error: float

    def __str__(self) -> str:
        if self.node is None:
            return f"first difference: {self.stage}, in group {self.group}, {_amount(self.error)}"
        source = source_of(self.node)
        return (
            f"first difference: after {self.stage}, in group {self.group}, {_amount(self.error)}:\n"
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
    that the unexpanded graph gives with that group's adapter. Arguments are those of `verify`; `batch_dim` is that of
    `transform`. None if all values agree up to the losses: then what follows them differs, derivatives or the update.
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
        one(ir)
        group, error = _worst([_loss(ir, {**each, **batch, **scalars}) for each in moved], losses)
        if error > LOSS_TOLERANCE:
            inputs = {**moved[group], **batch, **scalars}
            expected, found = _by_name(_values(before, inputs)[0]), _values(ir, inputs)[0]
            pairs = ((node, found[node], expected[node.name]) for node in found if node.name in expected)
            node, error = _first(pairs) or (ir.output_node(ir.outputs[0].kind), error)
            return Difference(one.name, node, group, error)
    return None


def _amount(error: float) -> str:
    return f"off by {error:.2g} of the largest entry" if math.isfinite(error) else "not finite, or not computed at all"


def _passes(program: TrainingProgram, ir: Ir, batch_dim: int) -> Iterator[Pass]:
    """Yield the passes up to that which lets the groups stand side by side, each to be run before the next is asked."""
    yield from pipelines.evaluate(program.labels["max_labels"])
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
    found, failed = _values(ir, {**adapter, **batch, **scalars})
    group, error = 0, math.inf
    if failed is None:
        losses = [_loss(before, {**each, **batch, **scalars}) for each in moved]
        group, error = _worst(list(found[ir.output_node("losses")]), losses)
    if error <= LOSS_TOLERANCE:
        return None
    expected = _by_name(_values(before, {**moved[group], **batch, **scalars})[0])

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

    node, error = _first(pairs()) or (failed or ir.output_node("losses"), error)
    return Difference(one.name, node, group, error)


def _values(ir: Ir, inputs: Mapping[str, Tensor]) -> tuple[dict[fx.Node, Any], fx.Node | None]:
    """Values of all nodes, in order, up to the one that does not run, which comes second, if there is one."""
    given = [inputs.get(role(node).name, ir.state.get(role(node).name)) for node in ir.placeholders()]
    interpreter = fx.Interpreter(nn.Module(), garbage_collect_values=False, graph=ir.graph)
    # What failed has been told already, with the text of PyTorch.
    with contextlib.suppress(RuntimeError, IndexError, ValueError):
        interpreter.run(*given)
    nodes = [node for node in ir.graph.nodes if node.op != "output"]
    failed = next((node for node in nodes if node not in interpreter.env), None)
    return {node: interpreter.env[node] for node in nodes if node in interpreter.env}, failed


def _by_name(values: Mapping[fx.Node, Any]) -> dict[str, Any]:
    return {node.name: value for node, value in values.items()}


def _loss(ir: Ir, inputs: Mapping[str, Tensor]) -> Tensor:
    out = ir.run(inputs)
    return (out["losses"] if "losses" in out else out["loss"]).mean()


def _worst(found: Iterable[Tensor], expected: Iterable[Tensor]) -> tuple[int, float]:
    """The group whose loss differs most, and by how much, relative to the loss where that is above one."""
    errors = [_error(a, b, floor=1.0) for a, b in zip(found, expected, strict=True)]
    return max(enumerate(errors), key=lambda pair: pair[1])


def _first(pairs: Iterable[tuple[fx.Node, Any, Any]]) -> tuple[fx.Node, float] | None:
    """The first node whose value differs, given found and expected values in the order of the graph."""
    errors = [
        (node, _error(found, expected))
        for node, found, expected in pairs
        if isinstance(found, Tensor) and isinstance(expected, Tensor) and found.numel() == expected.numel()
    ]
    for bound in _BOUNDS:
        for node, error in errors:
            if error > bound:
                return node, error
    return None


def _error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference, relative to the largest entry; infinite where one side alone is finite."""
    found, expected = found.reshape(expected.shape).double(), expected.double()
    if not expected.numel() or torch.equal(found, expected):
        return 0.0
    known = found.isfinite() & expected.isfinite()
    if not torch.equal(found[~known].nan_to_num(), expected[~known].nan_to_num()):
        return math.inf
    if not known.any():
        return 0.0
    largest = max(floor, float(expected[known].abs().max()))
    difference = float((found - expected)[known].abs().max())
    return difference / largest if largest else math.inf if difference else 0.0
