"""Directional derivatives, by forward mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from mobizo_passes.batching import Batch
from mobizo_passes.errors import InputError
from mobizo_passes.passes import DecomposeForGradients, ExpandTangents, InsertNoise, Linearize, Pass, RegroupLoss
from mobizo_passes.zo.estimators.base import Estimator
from mobizo_passes.zo.optimizers import Optimizer


class ForwardGradient(Estimator):
    """Directional derivatives: ``g_i = ∇L(θ)·z_i``, exact, by forward-mode differentiation; P = q groups of tangents.

    The primal values are computed once, on the plain batch; each query carries one tangent along. Nothing is perturbed,
    so a step takes no ε, and its one loss is L(θ). Update, journal and replay are those of the other estimators.

    Raises `InputError` if `queries` is not a positive int, or `normalize` is given: it divides by the deviation of
    perturbed losses, and there are none.
    """

    kind: ClassVar[str] = "forward_gradient"
    copies: ClassVar[str] = "θ, and a tangent z of each"
    formula: ClassVar[str] = "g = ∇L(θ)·z"
    uses_epsilon: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.normalize is not None:
            raise InputError(
                f"normalize={self.normalize!r} divides by the deviation of perturbed losses, and "
                f"{type(self).__name__} perturbs nothing; leave it out"
            )
        super().__post_init__()

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0),)

    @property
    def groups(self) -> int:
        """Number of groups P: how many copies of the batch the tangents run on."""
        return self.queries

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        raise NotImplementedError("a directional derivative is no function of losses")

    def manifest(self) -> Mapping[str, object]:
        return {"kind": self.kind, "queries": self.queries, "groups": self.groups, "normalize": None}

    def loss_passes(self, batch: Batch, batch_dim: int) -> tuple[Pass, ...]:
        return (RegroupLoss(batch), DecomposeForGradients(), Linearize(batch))

    def step_passes(self, noise: str, optimizer: Optimizer) -> tuple[Pass, ...]:
        return (InsertNoise(self.queries, noise), ExpandTangents(self.queries), *self._closing(optimizer))
