"""Adam with decoupled weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mobizo_passes.errors import InputError
from mobizo_passes.zo.optimizers.base import Optimizer, check_number


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter), as `torch.optim.AdamW`; `Adam` is the one without.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;  θ ← θ − lr · (m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps) + decay · θ)

    Raises `InputError` unless both betas are at least 0 and below 1, and eps is positive.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = field(default=0.01, kw_only=True)

    kind: ClassVar[str] = "adamw"
    formula: ClassVar[str] = "AdamW: θ ← θ − η·m̂ / √v̂"
    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise InputError(f"betas must be two numbers, found {self.betas!r}")
        for beta in self.betas:
            check_number("betas", beta, 0.0, 1.0)
        check_number("eps", self.eps, 0.0, math.inf)

    def shared(self, lr: Any, count: Any) -> Mapping[str, Any]:
        first, second = (_one_minus_power(beta, count) for beta in self.betas)
        return {"keep": 1.0 - lr * self.weight_decay, "rate": lr / first, "root": second.rsqrt()}

    def step(
        self, value: Any, gradient: Any, state: Mapping[str, Any], lr: Any, shared: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        first, second = self.betas
        mean = state["exp_avg"] * first + gradient * (1 - first)
        square = state["exp_avg_sq"] * second + gradient * gradient * (1 - second)
        moved = mean / (square.sqrt() * shared["root"] + self.eps) * shared["rate"]
        kept = value * shared["keep"] if self.weight_decay else value
        return kept - moved, {"exp_avg": mean, "exp_avg_sq": square}


def _one_minus_power(beta: float, count: Any) -> Any:
    """1 − βᵗ without the digits that the difference would lose at small t."""
    return (count * math.log(beta)).expm1() * -1.0 if beta else count * 0.0 + 1.0
