"""What can be chosen about a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetOption:
    """A keyword of `lower` that one target understands: its values, the default, and what it does."""

    name: str
    choices: tuple[str, ...]
    default: str
    help: str
