"""The scalars of a step as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobizo_passes.errors import InputError

if TYPE_CHECKING:
    from mobizo_passes.zo.estimators import Estimator


def drawn(estimator: Estimator, seed: int | None, eps: float | None) -> dict[str, Tensor]:
    """Return the inputs seed, int64 [1], and epsilon, float32 [1], of a step of an estimator that has them.

    Raises `InputError` if one is missing, not taken, or no such number.
    """
    given = {"seed": seed, "eps": eps}
    takes = [name for name, does in (("seed", estimator.projected), ("eps", estimator.uses_epsilon)) if does]
    for name, value in given.items():
        if name not in takes and value is not None:
            raise InputError(
                f"a step of {estimator} takes no {name}: the gradient is computed, not estimated from perturbed "
                "losses; leave it out"
            )
    if any(given[name] is None for name in takes):
        raise InputError(f"a step of {estimator} takes {' and '.join(f'{name}=' for name in takes)}")
    if eps is not None and not eps > 0:
        raise InputError(f"eps must be positive, found {eps}")
    values = {} if seed is None else {"seed": seed_tensor(seed)}
    return values if eps is None else {**values, "eps": torch.tensor([eps])}


def seed_tensor(seed: int) -> Tensor:
    """Return a seed as int64 [1]; raises `InputError` for what does not fit into that."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise InputError(f"seed must be a 64-bit integer, found {seed!r}")
    return torch.tensor([seed], dtype=torch.int64)
