"""Which factors of the sites are trained."""

from __future__ import annotations

from collections.abc import Iterable

from mobizo_passes.errors import InputError
from mobizo_passes.sites.lora_site import LoRASite

# Choice -> roles of the factors that are trained. LoRA-FA, the default, freezes lora_A.
TRAINABLE: dict[str, tuple[str, ...]] = {"lora_B": ("lora_B",), "lora_A+lora_B": ("lora_A", "lora_B")}


def trainable_fqns(sites: Iterable[LoRASite], trainable: str) -> list[str]:
    """Return the FQNs to train, in site order; raises `InputError` for an unknown choice."""
    if trainable not in TRAINABLE:
        choices = " or ".join(map(repr, TRAINABLE))
        raise InputError(f"trainable must be {choices}, found {trainable!r}")
    return list(dict.fromkeys(site.factors[role] for site in sites for role in TRAINABLE[trainable]))
