"""XNNPACK: float32 on CPUs, phones included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowering.targets.base import Target

if TYPE_CHECKING:
    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass


class XnnpackTarget(Target):
    """ExecuTorch's XNNPACK partitioner, kept from delegating pieces that hold no matrix product."""

    name = "xnnpack"
    backend = "XnnpackBackend"
    external_weights = True

    @property
    def passes(self) -> Sequence[Pass]:
        from lowering.targets.xnnpack.pipeline import PASSES

        return PASSES

    @property
    def dialect(self) -> Dialect:
        from lowering.targets.xnnpack.dialect import DIALECT

        return DIALECT

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        from lowering.targets.xnnpack.partitioner import ProductPartitioner

        return ProductPartitioner(outside=outside)
