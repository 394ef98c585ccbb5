"""The sequential reference: one forward at a time, or autograd, on the untransformed model.

This is the oracle that every program is tested against. It is written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mobizo_passes.capture.export import forward_with_loss
from mobizo_passes.capture.inputs import LossFn, bind_inputs, name_inputs
from mobizo_passes.capture.wrapped import unwrap
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.markup import table
from mobizo_passes.noise import noise, site_ids
from mobizo_passes.zo.estimators import Estimator, TwoSided
from mobizo_passes.zo.optimizers import SGD, Optimizer


@dataclass(frozen=True)
class StepResult:
    """One step's loss [], losses [P], projected_gradients [q] (float32), the new adapter (FQN -> tensor) and the
    optimizer's new state (name -> tensor). A step that perturbs nothing has one loss, that of the adapter itself;
    an exact one has no projected gradients."""

    loss: Tensor
    losses: Tensor
    projected_gradients: Tensor
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        losses, gradients = (", ".join(f"{v:.6g}" for v in x.tolist()) for x in (self.losses, self.projected_gradients))
        rows = [("loss", f"{float(self.loss):.6g}"), ("losses", losses), ("projected gradients", gradients or "none")]
        return table("one step", (), [*rows, ("adapter", f"{len(self.adapter)} new tensors")])


@neutral()
def step(
    model: nn.Module,
    example_inputs: Any,
    adapter: Mapping[str, Tensor],
    *,
    seed: int = 0,
    lr: float,
    eps: float = 1e-2,
    estimator: Estimator | None = None,
    optimizer: Optimizer | None = None,
    state: Mapping[str, Tensor] | None = None,
    noise_kind: str = "gaussian",
    loss: LossFn | None = None,
) -> StepResult:
    """Run one step; `adapter` maps trainable FQNs to float32 tensors, `state` is the optimizer's (None: the first).

    Zeroth-order with P sequential forwards; with `ForwardGradient` and `Exact` by autograd, where epsilon counts for
    nothing, and with `Exact` the seed neither.
    """
    estimator = estimator or TwoSided()
    if not estimator.projected:
        value, exact = gradients_of(model, example_inputs, adapter, loss)
        new, after = stepped(adapter, exact, lr=lr, optimizer=optimizer, state=state)
        return StepResult(value, value[None], torch.zeros(0), new, after)
    z = draw(adapter, seed, estimator.queries, noise_kind)
    if estimator.uses_epsilon:
        losses = []
        for query, factor in estimator.offsets:
            moved = {fqn: value + factor * eps * z[fqn][query] for fqn, value in adapter.items()}
            losses.append(loss_of(model, example_inputs, moved, loss))
        values = torch.stack(losses)
        gradients = projected_gradients(values, eps, estimator)
    else:
        value, exact = gradients_of(model, example_inputs, adapter, loss)
        values, gradients = value[None], along(exact, z)
    if optimizer is None or optimizer.plain:
        new = apply(adapter, seed=seed, lr=lr, projected_gradients=gradients, noise_kind=noise_kind)
        return StepResult(estimator.loss(values), values, gradients, new)
    estimates = estimated(adapter, seed=seed, projected_gradients=gradients, noise_kind=noise_kind)
    new, after = stepped(adapter, estimates, lr=lr, optimizer=optimizer, state=state)
    return StepResult(estimator.loss(values), values, gradients, new, after)


@neutral()
def gradients_of(
    model: nn.Module,
    example_inputs: Any,
    adapter: Mapping[str, Tensor],
    loss: LossFn | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [] and its gradient in each adapter tensor (zeros where it has none), by autograd.

    With `dtype` float64 the model's weights, the adapter and the floating-point inputs are widened, and so are the
    results: what the exact gradient is when nothing rounds.
    """

    model, _ = unwrap(model)

    def cast(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.is_floating_point() and dtype is torch.float64
        return value.to(dtype) if wide else value

    if isinstance(example_inputs, Mapping):
        inputs: Any = {name: cast(value) for name, value in example_inputs.items()}
    else:
        inputs = tuple(cast(value) for value in example_inputs)
    every = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(every[fqn]) for fqn in adapter}
    named = (*model.named_parameters(), *model.named_buffers())
    held = {name: cast(value.detach()) for name, value in named if id(value) not in trained}
    leaves = {fqn: cast(value.detach()).clone().requires_grad_(True) for fqn, value in adapter.items()}
    # What the model or the loss makes itself is wide too; `neutral` puts the default back.
    torch.set_default_dtype(dtype)
    with torch.enable_grad():
        weights = {**held, **leaves} if dtype is torch.float64 else leaves
        value = _run(model, inputs, weights, loss)[0].mean()
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    given = {
        fqn: torch.zeros_like(leaf).detach() if gradient is None else gradient
        for (fqn, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return value.detach(), given


def along(gradients: Mapping[str, Tensor], z: Mapping[str, Tensor]) -> Tensor:
    """Return the directional derivatives ``∇L·z_i``, [q], from gradient [*shape] and z [q, *shape] of each tensor."""
    products = [(z[fqn] * value).reshape(len(z[fqn]), -1).sum(1) for fqn, value in gradients.items()]
    return torch.stack(products).sum(0)


def estimated(
    adapter: Mapping[str, Tensor], *, seed: int, projected_gradients: Tensor, noise_kind: str = "gaussian"
) -> dict[str, Tensor]:
    """Return the estimate ``1/q · Σ_i g_i z_i`` of the gradient in each adapter tensor."""
    queries = len(projected_gradients)
    z = draw(adapter, seed, queries, noise_kind)
    shares = projected_gradients / queries
    return {fqn: (z[fqn] * shares.reshape(queries, *[1] * value.dim())).sum(0) for fqn, value in adapter.items()}


@neutral()
def stepped(
    adapter: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    lr: float,
    optimizer: Optimizer | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter and the optimizer's state after a step; without a `state` it is the first one."""
    optimizer = optimizer or SGD()
    before = optimizer.state(adapter) if state is None else state
    return optimizer.stepped(adapter, gradients, before, torch.tensor([lr]))


def projected_gradients(losses: Tensor, eps: float, estimator: Estimator) -> Tensor:
    """Return the projected gradients [q] that the losses [P] of all groups give."""
    gradients = estimator.differences(losses, eps)
    if estimator.normalize is None:
        return gradients
    perturbed = [losses[group] for group in estimator.perturbed_groups]
    std = torch.stack(perturbed).double().std(correction=1)
    return torch.zeros_like(gradients) if std == 0 else (gradients / std).to(losses.dtype)


@neutral()
def apply(
    adapter: Mapping[str, Tensor], *, seed: int, lr: float, projected_gradients: Tensor, noise_kind: str = "gaussian"
) -> dict[str, Tensor]:
    """Return ``θ − lr/q · Σ_i g_i z_i`` for every tensor of the adapter."""
    queries = len(projected_gradients)
    z = draw(adapter, seed, queries, noise_kind)
    new = {}
    for fqn, value in adapter.items():
        for i in range(queries):
            value = value - lr / queries * projected_gradients[i] * z[fqn][i]
        new[fqn] = value
    return new


def draw(adapter: Mapping[str, Tensor], seed: int, queries: int, kind: str) -> dict[str, Tensor]:
    """Return z of every trainable tensor, float32 [queries, *shape]."""
    ids = site_ids(adapter)
    at = torch.tensor([seed], dtype=torch.int64)
    return {fqn: noise(at, ids[fqn], queries, value.shape, kind) for fqn, value in adapter.items()}


@neutral()
def loss_of(model: nn.Module, example_inputs: Any, adapter: Mapping[str, Tensor], loss: LossFn | None = None) -> Tensor:
    """Return the loss of the untransformed model with this adapter, float32 []; a per-example loss is averaged."""
    return _run(model, example_inputs, adapter, loss)[0].mean()


@neutral()
def logits_of(
    model: nn.Module, example_inputs: Any, adapter: Mapping[str, Tensor], loss: LossFn | None = None
) -> Tensor:
    """Return the logits of the untransformed model with this adapter."""
    return _run(model, example_inputs, adapter, loss)[-1]


def _run(model: nn.Module, example_inputs: Any, adapter: Mapping[str, Tensor], loss: LossFn | None) -> Sequence[Tensor]:
    model, _ = unwrap(model)
    inputs = name_inputs(model, example_inputs, loss)
    batch = bind_inputs(inputs, example_inputs)
    weights = _in_places(model, adapter)

    def call(**given: Any) -> Any:
        return functional_call(model, weights, (), given, tie_weights=False)

    def positional(*args: Any, **given: Any) -> Any:
        return functional_call(model, weights, args, given, tie_weights=False)

    return forward_with_loss(positional if inputs.positional else call, inputs, loss, batch)


def _in_places(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name each tensor once for every place that holds it.

    `functional_call` ties by itself, but takes a module with two names for two and does not put its weight back.
    """
    held: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    places: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            places.setdefault(id(value), []).append(f"{prefix}.{name}" if prefix else name)
    return {place: value for fqn, value in tensors.items() for place in places[id(held[fqn])]}
