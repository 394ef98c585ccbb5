"""Optimizers, a file each: how a gradient, exact or estimated, becomes a step."""

from mobizo_passes.zo.optimizers.adamw import AdamW
from mobizo_passes.zo.optimizers.base import Optimizer, Stepped, append_optimizer, check_optimizer
from mobizo_passes.zo.optimizers.momentum import Momentum
from mobizo_passes.zo.optimizers.sgd import SGD

#: The list: names on the command line and kinds in manifests come from here.
OPTIMIZERS: dict[str, type[Optimizer]] = {each.kind: each for each in (SGD, Momentum, AdamW)}

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "AdamW",
    "Momentum",
    "Optimizer",
    "Stepped",
    "append_optimizer",
    "check_optimizer",
]
