"""Check a program against the sequential reference on the untransformed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import reference
from .errors import VerificationFailed
from .program import TrainingProgram
from .reference import StepResult

# Fused and sequential forwards sum in different orders; float32 keeps the losses this close, relative to their size.
LOSS_TOLERANCE = 2e-5


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

    Returns the program's step. Raises `VerificationFailed` naming the first group, query or site that differs. The
    tolerance on a projected gradient is the losses' tolerance divided by ε, on a site that times lr and its noise.
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
    bound = 2 * scale / eps
    gradients = zip(got.projected_gradients.tolist(), want.projected_gradients.tolist(), strict=True)
    for i, (a, b) in enumerate(gradients):
        if not abs(a - b) <= bound:
            raise VerificationFailed(
                f"projected gradient of query {i}: the program gives {a}, the reference {b} (tolerance {bound:.2g})"
            )
    for fqn, value in want.adapter.items():
        # |z| stays below 4.5; a few units in the last place of the tensor itself on top.
        limit = 4.5 * lr * bound + 1e-6 * max(1.0, float(value.abs().max()))
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
