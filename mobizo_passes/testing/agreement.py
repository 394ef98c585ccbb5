"""One or several steps of a compiled model against the sequential reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobizo_passes import reference
from mobizo_passes.autograd import LOSS_TOLERANCE
from mobizo_passes.errors import InputError, VerificationFailed
from mobizo_passes.program import TrainingProgram
from mobizo_passes.reference import StepResult
from mobizo_passes.testing.locate import first_difference
from mobizo_passes.transform import transform
from mobizo_passes.verify import verify


def check_agreement(
    model: nn.Module,
    example_inputs: Any,
    *,
    steps: int = 1,
    seed: int = 0,
    lr: float = 1e-3,
    eps: float = 1e-2,
    adapter: Mapping[str, Tensor] | None = None,
    program: TrainingProgram | None = None,
    **options: Any,
) -> StepResult:
    """Compile a model and hold steps of it against the sequential reference; returns the last step's result.

    Step i has the seed ``seed + i``, wrapped to 64 bits, and starts from what the step before made of the adapter and
    of the optimizer's state; each is checked as `verify` does it.

    Args:
        model: what `transform` takes, with LoRA or with `trainable` parameters, in eval mode. It is not changed.
        example_inputs: tuple of args or dict of kwargs, labels included.
        steps: how many steps are made, on the same batch.
        seed: of the first step; an estimator that draws nothing ignores it.
        lr: learning rate.
        eps: radius; an estimator that perturbs nothing ignores it.
        adapter: where the first step starts, FQN -> float32 tensor; None: from the model's own adapter.
        program: what `transform` made of the model, if it is at hand, for example inputs of these shapes; then there
            are no other options than `batch_dim`, with which it was made.
        options: those of `transform`: estimator, optimizer, noise, trainable, loss, sites, batch_dim, max_labels.

    Raises:
        VerificationFailed: they differ, or the program does not run. The message says what differs, and names the
            first node whose value does: its operator, its module, the line of the model, and the pass that changed it.
        InputError, CaptureError, NoLoRASites, UnsupportedOp: from `transform`.
    """
    batch_dim = options.get("batch_dim", 0)
    if program is None:
        program = transform(model, example_inputs, **options)
    elif set(options) - {"batch_dim"}:
        raise InputError(f"the program is made already: leave out {', '.join(sorted(options))}, or program=")
    if steps < 1:
        raise InputError(f"steps must be at least 1, found {steps}")
    now = program.initial_adapter() if adapter is None else dict(adapter)
    state = program.initial_optimizer()
    result: StepResult | None = None
    for i in range(steps):
        drawn = (seed + i + 2**63) % 2**64 - 2**63
        try:
            result = verify(program, model, example_inputs, seed=drawn, lr=lr, eps=eps, adapter=now, optimizer=state)
        except (VerificationFailed, RuntimeError, IndexError, ValueError) as error:
            found = first_difference(
                program, model, example_inputs, adapter=now, seed=drawn, eps=eps, batch_dim=batch_dim
            )
            where = str(found) if found else _UP_TO_LOSSES if program.estimator.uses_epsilon else _UP_TO_DERIVATIVES
            raise VerificationFailed(f"step {i} of {program.estimator}: {error}\n{where}") from error
        now, state = result.adapter, result.optimizer
    assert result is not None
    return result


_UP_TO_LOSSES = (
    "all values agree up to the losses: what follows from them differs, such as the estimator's differences, or the "
    "update"
)
_UP_TO_DERIVATIVES = (
    "all values agree up to the losses, and all derivatives operator by operator: what follows from them differs, such "
    "as tangents of several queries side by side, values that are computed again, or the update"
)


def well_conditioned(
    program: TrainingProgram, model: nn.Module, example_inputs: Any, *, seed: int = 0, eps: float = 1e-2
) -> bool:
    """Whether rounding alone leaves the reference's losses within a fraction of the tolerance that `verify` has.

    Adapters that differ in the last place stand for another order of summation. Where that alone moves the losses (a
    LayerNorm over equal features, an arg-max over a tie), float32 decides nothing, and a random model says nothing.
    """
    adapter = program.initial_adapter()

    def losses(sign: int) -> Tensor:
        moved = {k: v * (1 + sign * torch.finfo(v.dtype).eps) for k, v in adapter.items()}
        return reference.step(
            model, example_inputs, moved, seed=seed, lr=0.0, eps=eps, estimator=program.estimator,
            noise_kind=program.noise, loss=program.loss_fn,
        ).losses  # fmt: skip

    exact = losses(0)
    largest = max(1.0, float(exact.abs().max()))
    return all(float((losses(sign) - exact).abs().max()) <= 0.3 * LOSS_TOLERANCE * largest for sign in (1, -1))
