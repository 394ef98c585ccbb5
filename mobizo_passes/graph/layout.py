"""Where a value holds the batch or its groups."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where the groups lie: size along `dim` is ``outer * P * inner``."""

    dim: int
    outer: int = 1
