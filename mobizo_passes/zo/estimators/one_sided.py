"""Forward differences."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mobizo_passes.zo.estimators.base import Estimator


class OneSided(Estimator):
    """Forward differences: ``g_i = (L(θ+εz_i) − L(θ)) / ε``; P = q+1 groups, the unperturbed one first.

    ``normalize="std"`` divides every g_i by the unbiased standard deviation of the q perturbed losses, L(θ) left out
    (FZOO); where they are all equal, every g_i is 0. Raises `InputError` if `queries` is not a positive int, or 1 with
    ``normalize="std"``, or `normalize` unknown.
    """

    kind: ClassVar[str] = "one_sided"
    copies: ClassVar[str] = "θ and θ + ε·z"
    formula: ClassVar[str] = "g = (L(θ+εz) − L(θ)) / ε"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return ((0, 0), *((i, 1) for i in range(self.queries)))

    def perturb(self, value: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        step = z * eps
        base = value.unsqueeze(0)
        return torch.cat([base, base + step])

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return (losses[1:] - losses[:1]) / eps

    def perturbed(self, losses: Tensor) -> Tensor:
        return losses[1:]
