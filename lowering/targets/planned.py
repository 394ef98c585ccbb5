"""Targets that later versions will have: known by name, so that asking for one gives a plain answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lowering.errors import TargetNotSupported
from lowering.targets.base import Availability, Target

if TYPE_CHECKING:
    from lowering.passes.base import LegalisationPass

SUPPORTED = ("portable", "vulkan", "xnnpack")


class PlannedTarget(Target):
    """Refuses every request with `TargetNotSupported`."""

    def availability(self) -> Availability:
        return Availability(
            self.name, False, "not supported yet in this version of mobizo", f"use one of {', '.join(SUPPORTED)}"
        )

    @property
    def passes(self) -> Sequence[LegalisationPass]:
        self._refuse()

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        self._refuse()

    def require(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TargetNotSupported(self.name, SUPPORTED)
