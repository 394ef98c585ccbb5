"""Central differences."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mobizo_passes.zo.estimators.base import Estimator


class TwoSided(Estimator):
    """Central differences: ``g_i = (L(θ+εz_i) − L(θ−εz_i)) / 2ε``; P = 2q groups, all plus groups first (paper, eq. 1).

    ``normalize="std"`` divides every g_i by the unbiased standard deviation of the 2q losses (FZOO); where they are all
    equal, every g_i is 0. Raises `InputError` if `queries` is not a positive int, or `normalize` unknown.
    """

    kind: ClassVar[str] = "two_sided"
    copies: ClassVar[str] = "θ + ε·z and θ − ε·z"
    formula: ClassVar[str] = "g = (L(θ+εz) − L(θ−εz)) / 2ε"

    @property
    def offsets(self) -> tuple[tuple[int, float], ...]:
        return tuple((i, 1) for i in range(self.queries)) + tuple((i, -1) for i in range(self.queries))

    def perturb(self, value: Tensor, z: Tensor, eps: Tensor) -> Tensor:
        step = z * eps
        base = value.unsqueeze(0)
        return torch.cat([base + step, base - step])

    def differences(self, losses: Tensor, eps: Tensor | float) -> Tensor:
        return (losses[: self.queries] - losses[self.queries :]) / (eps * 2.0)
