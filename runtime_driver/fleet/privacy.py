"""What a federated client does to its projected gradients before it reports them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from runtime_driver.errors import HyperparameterError


@dataclass(frozen=True)
class Privacy:
    """What a client does to a report before it leaves: clip, add noise, and leave out loss and number of examples.

    Attributes:
        clip: bound on the L2 norm of the projected gradients of one local step.
        noise: standard deviation of the Gaussian noise on each of them, as a multiple of ``clip``.
    """

    clip: float
    noise: float

    def __post_init__(self) -> None:
        """Raises :class:`HyperparameterError`."""
        if not (self.clip > 0 and self.noise >= 0):
            raise HyperparameterError("privacy", "clip > 0 and noise >= 0", (self.clip, self.noise))

    def __call__(self, gradients: Sequence[float]) -> tuple[float, ...]:
        """The projected gradients to report."""
        # Not a generator that anybody could know the state of.
        draw = random.SystemRandom().gauss
        norm = math.sqrt(sum(value * value for value in gradients))
        scale = min(1.0, self.clip / norm) if norm else 1.0
        return tuple(value * scale + draw(0.0, self.noise * self.clip) for value in gradients)
