"""Plain gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mobizo_passes.zo.optimizers.base import Optimizer


@dataclass(frozen=True)
class SGD(Optimizer):
    """θ ← θ − lr · (g + weight_decay · θ), as `torch.optim.SGD`; it keeps nothing."""

    kind: ClassVar[str] = "sgd"
    formula: ClassVar[str] = "θ ← θ − η·g"

    def step(
        self, value: Any, gradient: Any, state: Mapping[str, Any], lr: Any, shared: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self.weight_decay:
            gradient = gradient + value * self.weight_decay
        return value - gradient * lr, {}

    @property
    def plain(self) -> bool:
        return not self.weight_decay and self.clip_norm is None
