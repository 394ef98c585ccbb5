"""What a LoRA site is, and what a candidate for one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from mobizo_passes.sites.adapter_kinds import adapter_kinds


@dataclass(frozen=True)
class LoRASite:
    """One low-rank update ``y += scaling · (x Aᵀ) Bᵀ``.

    `name` is the module's FQN, `lora_A` and `lora_B` are the FQNs of the factors. `scaling` is None if it is no number
    known at compile time. `in_features` and `out_features` count features, channels, or rows of an embedding. `kind` is
    linear, embedding, conv1d, conv2d, conv3d, or merged: B A is added to a stored weight before the product.
    """

    name: str
    lora_A: str  # noqa: N815  the field's own names
    lora_B: str  # noqa: N815
    rank: int
    scaling: float | None
    in_features: int
    out_features: int
    kind: str = "linear"

    @property
    def factors(self) -> dict[str, str]:
        """The FQN of each factor by its role, in the order in which they are applied."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}


@dataclass(frozen=True)
class Candidate:
    """A possible site, and the node that makes it one.

    `reason` says why it is not taken, empty if it is.
    """

    site: LoRASite
    reason: str
    node: fx.Node


def is_up(fqn: str) -> bool:
    """Return whether a parameter is named as lora_B is, in any kind of adapter."""
    return any(kind.is_up(fqn) for kind in adapter_kinds())


def is_factor(fqn: str) -> bool:
    """Return whether a parameter is named as lora_A or lora_B is, in any kind of adapter."""
    return any(kind.is_down(fqn) or kind.is_up(fqn) for kind in adapter_kinds())


def is_named(down: str, up: str) -> bool:
    """Return whether two parameters are named as lora_A and lora_B of one kind of adapter."""
    return any(kind.pairs(down, up) for kind in adapter_kinds())


def product(factors: Sequence[float | None]) -> float | None:
    """Return the product of scalings; None if one of them is not known."""
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


def module_name(a: str, b: str) -> str:
    """Return the FQN of the module that two factors belong to: what their kind says, or what their names share."""
    for kind in adapter_kinds():
        if kind.pairs(a, b):
            return kind.module(b) or b
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared) or b
