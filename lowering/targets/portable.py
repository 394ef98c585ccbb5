"""ExecuTorch's own kernels, no delegate: runs anywhere, slowly; the yardstick for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowering import pipelines
from lowering.passes.base import LegalisationPass
from lowering.targets.base import Availability, Target, executorch_availability


class PortableTarget(Target):
    """No partitioner at all."""

    name = "portable"

    def availability(self) -> Availability:
        return executorch_availability(self.name)

    @property
    def passes(self) -> Sequence[LegalisationPass]:
        return pipelines.PORTABLE

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        return None
