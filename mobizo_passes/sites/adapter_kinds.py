"""Kinds of adapters: how a library names the two factors of a low-rank update.

Sites are found by structure. Names decide what structure leaves open: whether a factor as wide as its layer belongs to
an adapter, and which tensors of an inactive adapter are its factors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mobizo_passes.errors import InputError
from mobizo_passes.sites import peft


@dataclass(frozen=True)
class AdapterKind:
    """Names of an adapter's factors, as regular expressions that match the end of a parameter's FQN.

    Args:
        name: the library or method, for messages.
        lora_A: matches the factor [rank, in] that reads the input.
        lora_B: matches the factor [out, rank] that gives the update. What comes before the match is the site's name.

    Raises `InputError` if one is no regular expression.
    """

    name: str
    lora_A: str  # noqa: N815  the field's own names
    lora_B: str  # noqa: N815
    _down: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _up: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for attribute, role in (("_down", "lora_A"), ("_up", "lora_B")):
            pattern = getattr(self, role)
            try:
                object.__setattr__(self, attribute, re.compile(rf"(?:^|\.)(?:{pattern})$"))
            except re.error as error:
                raise InputError(f"{role} of adapter kind '{self.name}' is no regular expression: {error}") from error

    def is_down(self, fqn: str) -> bool:
        """Return whether a parameter is named as lora_A is."""
        return self._down.search(fqn) is not None

    def is_up(self, fqn: str) -> bool:
        """Return whether a parameter is named as lora_B is."""
        return self._up.search(fqn) is not None

    def pairs(self, down: str, up: str) -> bool:
        """Return whether two parameters are named as the factors of one update are."""
        return self.is_down(down) and self.is_up(up)

    def module(self, up: str) -> str:
        """Return the FQN of the module that holds a lora_B of this kind."""
        return self._up.sub("", up)


_KINDS: list[AdapterKind] = [
    *(AdapterKind("PEFT", down, up) for down, up in peft.FACTOR_NAMES),
    AdapterKind("torchtune", r"lora_a(\.weight)?", r"lora_b(\.weight)?"),
    AdapterKind("diffusers", r"lora\.down(\.weight)?", r"lora\.up(\.weight)?"),
]


def adapter_kinds() -> tuple[AdapterKind, ...]:
    """Return all kinds, those that come with the package first."""
    return tuple(_KINDS)


def register_adapter_kind(kind: AdapterKind) -> AdapterKind:
    """Let the names of an adapter of your own count as those of LoRA factors; returns the kind.

    Raises `InputError` for a name that is taken.
    """
    if any(known.name == kind.name for known in _KINDS):
        raise InputError(f"there is an adapter kind '{kind.name}' already; unregister it first, or use another name")
    _KINDS.append(kind)
    return kind


def unregister_adapter_kind(kind: AdapterKind) -> None:
    """Undo `register_adapter_kind`. Raises `InputError` if the kind is not registered."""
    if kind not in _KINDS:
        raise InputError(f"adapter kind '{kind.name}' is not registered")
    _KINDS.remove(kind)
