"""ExecuTorch's own kernels, no delegate: runs anywhere, slowly; the yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowering.targets.base import Target

if TYPE_CHECKING:
    from mobizo_passes.graph.passes import Pass


class PortableTarget(Target):
    """No partitioner at all."""

    name = "portable"
    external_weights = True

    @property
    def passes(self) -> Sequence[Pass]:
        from lowering.targets.portable.pipeline import PASSES

        return PASSES

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        return None
