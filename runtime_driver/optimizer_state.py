"""The optimizer's state: tensors that the step takes and returns beside the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.format import Manifest


def fresh(manifest: Manifest) -> dict[str, Tensor]:
    """The state before the first step, zeros by name; empty for an optimizer without one."""
    import torch

    state = [item for item in manifest.methods["step"].inputs if item.role == "optimizer"]
    return {item.name: torch.zeros(item.shape, dtype=getattr(torch, item.dtype)) for item in state}
