"""The exact gradient, by reverse mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mobizo_passes.batching import Batch
from mobizo_passes.errors import InputError
from mobizo_passes.passes import AppendGradients, AppendOptimizer, DecomposeForGradients, Pass
from mobizo_passes.zo.estimators.base import Estimator
from mobizo_passes.zo.optimizers import Optimizer
from mobizo_passes.zo.scheme import Normalize


@dataclass(frozen=True, repr=False)
class Exact(Estimator):
    """∇L(θ) by reverse-mode differentiation of the graph, written out as further forward operators; one plain batch.

    No direction is drawn, so a step takes neither seed nor ε, and there are no projected gradients: it can't be redone
    from a few scalars. It holds the activations between the lowest adapter tensor and the loss.

    With `gradients` the program has a method of that name too, for those who do the update themselves.
    """

    queries: int = 0
    normalize: Normalize = None
    gradients: bool = False

    kind: ClassVar[str] = "exact"
    copies: ClassVar[str] = "θ"
    formula: ClassVar[str] = "g = ∂L(θ)/∂θ"
    projected: ClassVar[bool] = False
    uses_epsilon: ClassVar[bool] = False

    def __init__(self, *, gradients: bool = False) -> None:
        object.__setattr__(self, "queries", 0)
        object.__setattr__(self, "normalize", None)
        if not isinstance(gradients, bool):
            raise InputError(f"gradients must be True or False, found {gradients!r}")
        object.__setattr__(self, "gradients", gradients)

    def __repr__(self) -> str:
        return f"Exact({'gradients=True' if self.gradients else ''})"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0),)

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return losses[:0]

    def manifest(self) -> Mapping[str, object]:
        return {"kind": self.kind, "queries": 0, "groups": 1, "normalize": None, "perturbed_groups": []}

    def gradient_passes(self) -> tuple[Pass, ...]:
        """Return the passes that turn the loss into loss and gradients."""
        return (DecomposeForGradients(), AppendGradients())

    def loss_passes(self, batch: Batch, batch_dim: int) -> tuple[Pass, ...]:
        return ()

    def step_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        return (AppendOptimizer(optimizer),)

    def apply_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        raise NotImplementedError("an exact step is no function of projected gradients")
