"""Nothing that is not finite becomes an adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime_driver.errors import NonFiniteAdapterError, NonFiniteLossError

if TYPE_CHECKING:
    from torch import Tensor


def check_step(
    step: int | None,
    loss: float,
    losses: Sequence[float],
    gradients: Sequence[float],
    inputs: Mapping[str, Tensor],
    *,
    before_any_update: bool,
) -> None:
    """Raise :class:`NonFiniteLossError` unless all that a step returned beside the adapter is finite.

    ``inputs`` are the step's batch, which may be to blame.
    """
    outputs = [] if math.isfinite(loss) else ["loss"]
    outputs += [f"losses[{place}]" for place, value in enumerate(losses) if not math.isfinite(value)]
    outputs += [] if all(map(math.isfinite, gradients)) else ["projected_gradients"]
    if outputs:
        raise NonFiniteLossError(
            step,
            loss,
            list(gradients),
            outputs=outputs,
            bad_inputs=[name for name, tensor in inputs.items() if _not_finite(tensor)],
            before_any_update=before_any_update,
        )


def check_adapter(adapter: Mapping[str, Tensor], step: int | None = None) -> None:
    """Raise :class:`NonFiniteAdapterError` for an adapter with NaN or infinity; ``step``: the one that gave it."""
    for fqn, tensor in adapter.items():
        count = _not_finite(tensor)
        if count:
            raise NonFiniteAdapterError(step, fqn, count, tensor.numel())


def _not_finite(tensor: Tensor) -> int:
    import torch

    return tensor.numel() - int(torch.isfinite(tensor).sum())
