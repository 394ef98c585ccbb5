"""Check a program against the sequential reference on the untransformed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mobizo_passes import reference
from mobizo_passes.errors import VerificationFailed
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.program import TrainingProgram
from mobizo_passes.reference import StepResult

# Fused and sequential forwards sum in different orders; float32 keeps the losses this close, relative to their size.
LOSS_TOLERANCE = 2e-5
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
) -> StepResult:
    """Run one step both ways and compare losses, projected gradients and every updated tensor.

    Returns the program's step. Raises `VerificationFailed` naming the first group, query or site that differs. Losses
    are compared with the reference's forwards. Projected gradients are compared with what the reference makes of the
    program's own losses, and updated tensors with what it makes of the program's own projected gradients, so that both
    are held to float32 rounding: an error in a loss, divided by ε or by a small standard deviation, would hide much.
    """
    adapter = program.initial_adapter()
    got = program.step(adapter, example_inputs, seed=seed, lr=lr, eps=eps)
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
    updated = reference.apply(
        adapter, seed=seed, lr=lr, projected_gradients=got.projected_gradients, noise_kind=program.noise
    )
    longest = LARGEST_NOISE * lr * float(got.projected_gradients.abs().max())
    for fqn, value in updated.items():
        limit = ROUNDING * (float(value.abs().max()) + longest)
        difference = float((got.adapter[fqn] - value).abs().max())
        if not difference <= limit:
            raise VerificationFailed(
                f"site '{fqn}': updated tensors differ by {difference:.3g} (tolerance {limit:.2g})"
            )
    again = program.apply(adapter, seed=seed, lr=lr, projected_gradients=got.projected_gradients)
    for fqn, value in again.items():
        if not torch.equal(value, got.adapter[fqn]):
            raise VerificationFailed(f"site '{fqn}': apply and step give different tensors from the same gradients")
    return got
