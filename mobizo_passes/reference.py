"""The sequential reference: zeroth-order optimisation one forward at a time, on the untransformed model.

This is the oracle that every program is tested against. It is written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mobizo_passes.capture.export import forward_with_loss
from mobizo_passes.capture.inputs import LossFn, bind_inputs, name_inputs
from mobizo_passes.capture.wrapped import unwrap
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.noise import noise, site_ids
from mobizo_passes.zo.estimators import Estimator, TwoSided


@dataclass(frozen=True)
class StepResult:
    """One step's loss [], losses [P], projected_gradients [q] (float32) and the new adapter (FQN -> tensor)."""

    loss: Tensor
    losses: Tensor
    projected_gradients: Tensor
    adapter: dict[str, Tensor]


@neutral()
def step(
    model: nn.Module,
    example_inputs: Any,
    adapter: Mapping[str, Tensor],
    *,
    seed: int,
    lr: float,
    eps: float,
    estimator: Estimator | None = None,
    noise_kind: str = "gaussian",
    loss: LossFn | None = None,
) -> StepResult:
    """Run one zeroth-order step with P sequential forwards; `adapter` maps trainable FQNs to float32 tensors."""
    estimator = estimator or TwoSided()
    z = draw(adapter, seed, estimator.queries, noise_kind)
    losses = []
    for query, factor in estimator.offsets:
        moved = {fqn: value + factor * eps * z[fqn][query] for fqn, value in adapter.items()}
        losses.append(loss_of(model, example_inputs, moved, loss))
    values = torch.stack(losses)
    gradients = projected_gradients(values, eps, estimator)
    new = apply(adapter, seed=seed, lr=lr, projected_gradients=gradients, noise_kind=noise_kind)
    return StepResult(estimator.loss(values), values, gradients, new)


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

    def call(**given: Any) -> Any:
        return functional_call(model, dict(adapter), (), given, tie_weights=True)

    def positional(*args: Any, **given: Any) -> Any:
        return functional_call(model, dict(adapter), args, given, tie_weights=True)

    with torch.no_grad():
        return forward_with_loss(positional if inputs.positional else call, inputs, loss, batch)
