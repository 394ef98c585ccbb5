"""Gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mobizo_passes.zo.optimizers.base import Optimizer, check_number


@dataclass(frozen=True)
class Momentum(Optimizer):
    """m ← beta · m + g + weight_decay · θ;  θ ← θ − lr · m, as `torch.optim.SGD` with `momentum`.

    Raises `InputError` unless 0 <= beta < 1.
    """

    beta: float = 0.9

    kind: ClassVar[str] = "momentum"
    formula: ClassVar[str] = "m ← β·m + g;  θ ← θ − η·m"
    slots: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("beta", self.beta, 0.0, 1.0)

    def step(
        self, value: Any, gradient: Any, state: Mapping[str, Any], lr: Any, shared: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.weight_decay:
            gradient = gradient + value * self.weight_decay
        momentum = state["momentum"] * self.beta + gradient
        return value - momentum * lr, {"momentum": momentum}
