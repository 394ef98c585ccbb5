"""What a LoRA site is, and what a candidate for one is; conventional names of their parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

# (down, up) parameter names of PEFT, torchtune, diffusers and the original loralib.
_CONVENTIONS = (
    (re.compile(r"(^|\.)lora_A(\.[^.]+)?(\.weight)?$"), re.compile(r"(^|\.)lora_B(\.[^.]+)?(\.weight)?$")),
    (re.compile(r"(^|\.)lora_embedding_A(\.[^.]+)?$"), re.compile(r"(^|\.)lora_embedding_B(\.[^.]+)?$")),
    (re.compile(r"(^|\.)lora_a(\.weight)?$"), re.compile(r"(^|\.)lora_b(\.weight)?$")),
    (re.compile(r"(^|\.)lora\.down(\.weight)?$"), re.compile(r"(^|\.)lora\.up(\.weight)?$")),
)


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


@dataclass(frozen=True)
class Candidate:
    """A possible site, and the node that makes it one.

    `reason` says why it is not taken, empty if it is.
    """

    site: LoRASite
    reason: str
    node: fx.Node


def is_up(fqn: str) -> bool:
    """Return whether a parameter carries a conventional name of lora_B."""
    return any(up.search(fqn) for _, up in _CONVENTIONS)


def is_factor(fqn: str) -> bool:
    """Return whether a parameter carries a conventional name of lora_A or lora_B."""
    return any(low.search(fqn) or up.search(fqn) for low, up in _CONVENTIONS)


def is_named(down: str, up: str) -> bool:
    """Return whether two parameters carry conventional names of lora_A and lora_B."""
    return any(low.search(down) and high.search(up) for low, high in _CONVENTIONS)


def product(factors: Sequence[float | None]) -> float | None:
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


def module_name(a: str, b: str) -> str:
    for low, high in _CONVENTIONS:
        if low.search(a) and high.search(b):
            return high.sub("", b) or b
    shared = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared) or b
