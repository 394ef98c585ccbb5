"""XNNPACK: float32 on CPUs, phones included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from lowering.targets.base import Target
from lowering.targets.options import TargetOption

if TYPE_CHECKING:
    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass


class XnnpackTarget(Target):
    """ExecuTorch's XNNPACK partitioner, kept from delegating pieces that hold no matrix product."""

    name = "xnnpack"
    backend = "XnnpackBackend"
    external_weights = True
    implied = frozenset({"precision", "weights"})
    options = (
        TargetOption(
            "weights",
            ("packed", "mapped"),
            "packed",
            "Whether products read copies of the weights packed at loading, or the file's own, which takes a tenth "
            "more time and no memory; exact gradients read mapped ones unless told otherwise.",
        ),
    )

    def suited(self, manifest: Mapping[str, Any]) -> Self:
        """An exact step reads each weight in both directions: packed, it would be in memory three times."""
        if manifest["estimator"]["queries"] or self.chosen.get("weights") is None or "weights" in self._asked:
            return self
        return self.configured({**self._asked, "weights": "mapped"})

    @property
    def copies_weights(self) -> bool:
        # A target of a user's own, built on this one, may offer other options.
        return self.chosen.get("weights", "packed") == "packed"

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

        return ProductPartitioner(outside=outside, mapped=not self.copies_weights)
