"""The exact gradient, by reverse mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mobizo_passes.batching import Batch
from mobizo_passes.errors import InputError
from mobizo_passes.passes import (
    AppendGradients,
    AppendOptimizer,
    CombineFactors,
    DecomposeForGradients,
    Pass,
    RecomputeLayers,
)
from mobizo_passes.zo.estimators.base import Estimator
from mobizo_passes.zo.optimizers import Optimizer
from mobizo_passes.zo.scheme import Normalize


@dataclass(frozen=True, repr=False)
class Exact(Estimator):
    """∇L(θ) by reverse-mode differentiation of the graph, written out as further forward operators; one plain batch.

    No direction is drawn, so a step takes neither seed nor ε, and there are no projected gradients: it can't be redone
    from a few scalars. It holds the activations between the lowest adapter tensor and the loss.

    With ``checkpoint="layer"`` it holds the layers' inputs alone, and the gradient computes each layer's forward again.
    With `gradients` the program has a method of that name too, for those who do the update themselves.
    """

    queries: int = 0
    normalize: Normalize = None
    gradients: bool = False
    checkpoint: str | None = None

    kind: ClassVar[str] = "exact"
    copies: ClassVar[str] = "θ"
    formula: ClassVar[str] = "g = ∂L(θ)/∂θ"
    projected: ClassVar[bool] = False
    uses_epsilon: ClassVar[bool] = False

    def __init__(self, *, gradients: bool = False, checkpoint: str | None = None) -> None:
        object.__setattr__(self, "queries", 0)
        object.__setattr__(self, "normalize", None)
        if not isinstance(gradients, bool):
            raise InputError(f"gradients must be True or False, found {gradients!r}")
        if checkpoint not in (None, "layer"):
            raise InputError(f"checkpoint must be None or 'layer', found {checkpoint!r}")
        object.__setattr__(self, "gradients", gradients)
        object.__setattr__(self, "checkpoint", checkpoint)

    def __repr__(self) -> str:
        given = {"gradients": self.gradients, "checkpoint": self.checkpoint}
        return f"Exact({', '.join(f'{name}={value!r}' for name, value in given.items() if value)})"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0),)

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return losses[:0]

    def manifest(self) -> Mapping[str, object]:
        facts = {"kind": self.kind, "queries": 0, "groups": 1, "normalize": None, "perturbed_groups": []}
        return facts if self.checkpoint is None else {**facts, "checkpoint": self.checkpoint}

    def gradient_passes(self) -> tuple[Pass, ...]:
        """Return the passes that turn the loss into loss and gradients."""
        recompute = (RecomputeLayers(),) if self.checkpoint else ()
        return (DecomposeForGradients(), AppendGradients(), CombineFactors(), *recompute)

    def loss_passes(self, batch: Batch, batch_dim: int) -> tuple[Pass, ...]:
        return ()

    def step_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        return (AppendOptimizer(optimizer),)

    def apply_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        raise NotImplementedError("an exact step is no function of projected gradients")
