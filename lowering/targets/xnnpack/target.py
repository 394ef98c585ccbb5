"""XNNPACK: CPUs, phones included, in float32 or float16."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from lowering.errors import InvalidOption
from lowering.targets.base import Target
from lowering.targets.options import TargetOption

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass


class XnnpackTarget(Target):
    """ExecuTorch's XNNPACK partitioner, kept from delegating pieces that hold no matrix product.

    With `precision="fp16"` the body computes and stores its weights in half precision, what is outside of the delegate
    in float32; inputs and outputs stay float32.
    """

    name = "xnnpack"
    backend = "XnnpackBackend"
    external_weights = True
    precisions = ("fp32", "fp16")
    precision_help = "What the delegate stores and computes in; inputs and outputs stay float32."
    implied = frozenset({"precision", "weights"})
    options = (
        TargetOption(
            "weights",
            ("packed", "balanced", "mapped"),
            "packed",
            "Whether products read copies of the weights packed at loading; or the file's own, which takes a tenth "
            "more time and no memory; or copies of the largest third, the default of steps that differentiate.",
        ),
    )

    def suited(self, manifest: Mapping[str, Any]) -> Self:
        """A step that differentiates reads each weight in two products: packed, it would be in memory twice.

        A third of the weights are, and none where layers are computed again to save memory.

        Raises:
            InvalidOption: an exact step in halves, where what a backward passes on would vanish unscaled.
        """
        if self.precision == "fp16" and not manifest["estimator"]["queries"]:
            raise InvalidOption("precision", "fp16", f"{self.name} with exact gradients", ("fp32",))
        step = manifest["methods"].get("step")
        differentiates = step is not None and all(spec["role"] != "eps" for spec in step["inputs"])
        open_to_us = self.chosen.get("weights") is not None and "weights" not in self._asked
        if not differentiates or not open_to_us or self.precision == "fp16":
            return self
        saving = manifest["estimator"].get("checkpoint") is not None
        return self.configured({**self._asked, "weights": "mapped" if saving else "balanced"})

    def configured(self, options: Mapping[str, object]) -> Self:
        target = super().configured(options)
        if target.precision == "fp16" and target._weights != "packed":
            # XNNPACK's partitioner leaves only float32 weights where they are.
            raise InvalidOption("weights", target._weights, f"{self.name} in fp16", ("packed",))
        return target

    def fitted(self, programs: Mapping[str, ExportedProgram]) -> Self:
        if self._weights == "packed":
            return self
        from lowering.targets.tied import embedding_tables
        from lowering.targets.xnnpack.weights import largest_third, weights_of_products

        weights = weights_of_products(programs.values())
        target = copy.copy(self)
        target.in_place = frozenset(weights)
        if self._weights == "balanced":
            target.in_place -= largest_third(weights, embedding_tables(programs))
        return target

    @property
    def _weights(self) -> str:
        # A target of a user's own, built on this one, may offer other options.
        return self.chosen.get("weights", "packed")

    @property
    def passes(self) -> Sequence[Pass]:
        from lowering.targets.xnnpack.pipeline import PASSES

        return PASSES[self.precision]

    @property
    def loss_tolerance(self) -> float:
        """Half precision has 11 bits: 1e-3 was seen on losses."""
        return 1e-2 if self.precision == "fp16" else super().loss_tolerance

    @property
    def small_share(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        # A tied head in halves beside a table in halves takes what one table of floats does.
        return 0.0 if self.precision == "fp16" else 0.01

    @property
    def dialect(self) -> Dialect:
        from lowering.targets.xnnpack.dialect import DIALECT

        return DIALECT

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        from lowering.targets.xnnpack.partitioner import ProductPartitioner

        return ProductPartitioner(outside, self.in_place)
