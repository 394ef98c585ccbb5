"""Check a program against the sequential reference on the untransformed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_passes import reference
from mobizo_passes.autograd import LOSS_TOLERANCE, Autograd
from mobizo_passes.capture.quantized import dequantized
from mobizo_passes.errors import VerificationFailed
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.program import TrainingProgram
from mobizo_passes.reference import StepResult

# Gradients follow from losses, and updates from gradients, in a few float32 operations on both sides.
ROUNDING = 1e-5
# |z| stays below this.
LARGEST_NOISE = 4.5


@neutral()
def verify(
    program: TrainingProgram,
    model: nn.Module,
    example_inputs: Any,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    eps: float = 1e-2,
    adapter: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
) -> StepResult:
    """Run one step both ways and compare losses, gradients (or their projections) and every updated tensor.

    The step starts from `adapter` and from `optimizer`, its state; None: from the program's initial ones. Returns the
    program's step. Raises `VerificationFailed` naming the first group, query or site that differs. Losses are compared
    with the reference's forwards. Projected gradients are compared with what the reference makes of the program's own
    losses, and updated tensors with what it makes of the program's own projected gradients, so that both are held to
    float32 rounding: an error in a loss, divided by ε or by a small standard deviation, would hide much. Exact
    gradients, and directional derivatives, are compared with autograd's in float64; `eps` counts for nothing then, and
    for exact gradients neither does `seed`. Four-bit layers of bitsandbytes multiply by dequantized weights meanwhile.
    """
    with dequantized(model):
        return _verify(program, model, example_inputs, seed, lr, eps, adapter, optimizer)


def _verify(
    program: TrainingProgram,
    model: nn.Module,
    example_inputs: Any,
    seed: int,
    lr: float,
    eps: float,
    adapter: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor] | None,
) -> StepResult:
    adapter = program.initial_adapter() if adapter is None else adapter
    state = program.initial_optimizer() if optimizer is None else optimizer
    if not program.estimator.projected:
        return _verify_exact(program, model, example_inputs, adapter, state, lr)
    if not program.estimator.uses_epsilon:
        got = program.step(adapter, example_inputs, seed=seed, lr=lr, optimizer=state)
        z = reference.draw(adapter, seed, program.estimator.queries, program.noise)
        true = Autograd.of(model, example_inputs, adapter, program.loss_fn)
        true.check_directional(got.loss, got.projected_gradients, z)
        _check_update(got, program, adapter, state, seed, lr)
        return got
    got = program.step(adapter, example_inputs, seed=seed, lr=lr, eps=eps, optimizer=state)
    want = reference.step(
        model,
        example_inputs,
        adapter,
        seed=seed,
        lr=lr,
        eps=eps,
        estimator=program.estimator,
        noise_kind=program.noise,
        loss=program.loss_fn,
    )
    scale = LOSS_TOLERANCE * max(1.0, float(want.losses.abs().max()))
    for i, (a, b) in enumerate(zip(got.losses.tolist(), want.losses.tolist(), strict=True)):
        if not abs(a - b) <= scale:
            raise VerificationFailed(
                f"loss of group {i}: the program gives {a}, the reference {b} (tolerance {scale:.2g})"
            )
    gradients = reference.projected_gradients(got.losses, eps, program.estimator)
    bound = ROUNDING * float(gradients.abs().max())
    for i, (a, b) in enumerate(zip(got.projected_gradients.tolist(), gradients.tolist(), strict=True)):
        if not abs(a - b) <= bound:
            raise VerificationFailed(
                f"projected gradient of query {i}: the program gives {a}, the reference {b} (tolerance {bound:.2g})"
            )
    _check_update(got, program, adapter, state, seed, lr)
    return got


def _check_update(
    got: StepResult,
    program: TrainingProgram,
    adapter: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    seed: int,
    lr: float,
) -> None:
    """The adapter is what the projected gradients make of it, in the step as in `apply`."""
    given = got.projected_gradients
    longest = LARGEST_NOISE * lr * float(given.abs().max())
    if program.optimizer.plain:
        updated = reference.apply(adapter, seed=seed, lr=lr, projected_gradients=given, noise_kind=program.noise)
    else:
        estimates = reference.estimated(adapter, seed=seed, projected_gradients=given, noise_kind=program.noise)
        updated, _ = reference.stepped(adapter, estimates, lr=lr, optimizer=program.optimizer, state=state)
        longest = max(longest, lr)
    _check_updated(got.adapter, updated, longest)
    again = program.apply(adapter, seed=seed, lr=lr, projected_gradients=given, optimizer=state)
    for name, value in again.items():
        if not torch.equal(value, {**got.adapter, **got.optimizer}[name]):
            raise VerificationFailed(f"'{name}': apply and step give different tensors from the same gradients")


def _check_updated(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], longest: float) -> None:
    for fqn, value in expected.items():
        limit = ROUNDING * (float(value.abs().max()) + longest)
        difference = float((got[fqn] - value).abs().max())
        if not difference <= limit:
            raise VerificationFailed(
                f"site '{fqn}': updated tensors differ by {difference:.3g} (tolerance {limit:.2g})"
            )


def _verify_exact(
    program: TrainingProgram,
    model: nn.Module,
    example_inputs: Any,
    adapter: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    lr: float,
) -> StepResult:
    got = program.step(adapter, example_inputs, lr=lr, optimizer=state)
    gradients = program.gradients(adapter, example_inputs)
    Autograd.of(model, example_inputs, adapter, program.loss_fn).check_gradients(got.loss, gradients)
    # From the program's own gradients: Adam's first step is little more than their sign.
    updated, _ = reference.stepped(adapter, gradients, lr=lr, optimizer=program.optimizer, state=state)
    _check_updated(got.adapter, updated, lr * max(1.0, *(float(each.abs().max()) for each in gradients.values())))
    return got
