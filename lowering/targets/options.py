"""What can be chosen about a target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetOption:
    """A keyword of `lower`, and a key of the command line's `--option KEY=VALUE`, that one target understands.

    `choices` are its values, `help` says in one sentence what it decides.
    """

    name: str
    choices: tuple[str, ...]
    default: str
    help: str


#: Names that an option cannot have: keywords of `lower` for every target.
RESERVED = frozenset(
    {
        "program",
        "target",
        "precision",
        "etrecord",
        "application",
        "adapter",
        "calibration",
        "external_weights",
        "weights_file",
        "check",
        "measure",
    }
)
