"""The whole compile story: which passes make which program, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mobizo_passes.batching import Batch
from mobizo_passes.passes import (
    Canonicalize,
    CanonicalizeProducts,
    Decompose,
    DecomposeForBatching,
    DropShifts,
    FoldConstants,
    GatherLabels,
    HoistSelections,
    InternalizeAdapter,
    LiftAdapter,
    Pass,
    SimplifyLayouts,
    SplitComplex,
    SplitLoss,
    StackNoise,
    UnstackNumbers,
)
from mobizo_passes.zo.estimators import Estimator, Exact
from mobizo_passes.zo.optimizers import SGD, Optimizer

_PLAIN = SGD()


def clean(keep_detached: bool = False) -> tuple[Pass, ...]:
    """Captured graph -> the graph in which sites are sought."""
    return (
        Canonicalize(keep_detached),
        UnstackNumbers(),
        SplitComplex(),
        DropShifts(),
        FoldConstants(),
        SimplifyLayouts(),
        CanonicalizeProducts(),
    )


def lift(fqns: Sequence[str]) -> tuple[Pass, ...]:
    """-> a function of adapter and batch: `logits` ends here."""
    return (LiftAdapter(tuple(fqns)), DecomposeForBatching())


def evaluate(max_labels: int | None) -> tuple[Pass, ...]:
    """-> the loss without what it does not read."""
    gather = () if max_labels is None else (GatherLabels(max_labels),)
    return (*gather, HoistSelections())


def parts(batch: Batch) -> tuple[Pass, ...]:
    """-> the loss with what evaluation needs to combine batches: `loss` ends here."""
    return (SplitLoss(batch),)


def step(
    estimator: Estimator, noise: str, batch: Batch, batch_dim: int = 0, optimizer: Optimizer = _PLAIN
) -> tuple[Pass, ...]:
    """-> the readable training step."""
    return (*estimator.loss_passes(batch, batch_dim), *estimator.step_passes(noise, optimizer))


def gradients(estimator: Exact) -> tuple[Pass, ...]:
    """-> the loss and its gradient: what the step of an exact estimator starts from."""
    return estimator.gradient_passes()


def apply(estimator: Estimator, noise: str, optimizer: Optimizer = _PLAIN) -> tuple[Pass, ...]:
    """Adapter and projected gradients -> the new adapter, without the model."""
    return estimator.apply_passes(noise, optimizer)


def core() -> tuple[Pass, ...]:
    """Readable program -> core ATen, for lowering."""
    return (StackNoise(), Decompose(), FoldConstants(), Canonicalize())


def internal(initial: Mapping[str, Tensor]) -> tuple[Pass, ...]:
    """A step, readable or core -> the step with its adapter inside."""
    return (InternalizeAdapter(initial),)
