"""Vulkan: GPUs of phones and desktops, in float32 or float16."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from lowering.executorch_compat.vulkan import root_log_level_kept
from lowering.targets.base import Target
from lowering.targets.vulkan import BACKEND, NAME

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass


class VulkanTarget(Target):
    """ExecuTorch's Vulkan partitioner, kept from what its runtime gets wrong; the result is checked rule by rule.

    With `precision="fp16"` the delegate stores and computes in half precision; inputs and outputs stay float32, and
    what is outside of the delegate computes in float32.
    """

    name = NAME
    backend = BACKEND
    runtime = (
        "build ExecuTorch's runtime from source with -DEXECUTORCH_BUILD_VULKAN=ON, for Android or for a desktop with a "
        "Vulkan driver; no wheel on PyPI has it"
    )
    small_share = 0.005
    precisions = ("fp32", "fp16")
    precision_help = "What the delegate stores and computes in; inputs and outputs stay float32."
    implied = frozenset()

    @property
    def loss_tolerance(self) -> float:
        """Half precision has 11 bits: 1e-3 was seen on losses, and devices that cut instead of round double it."""
        return 1e-2 if self.precision == "fp16" else super().loss_tolerance

    @property
    def passes(self) -> Sequence[Pass]:
        from lowering.targets.vulkan.pipeline import PASSES

        return PASSES[self.precision]

    @property
    def dialect(self) -> Dialect:
        from lowering.targets.vulkan.dialect import DIALECT

        return DIALECT

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        with root_log_level_kept():
            from lowering.targets.vulkan.partitioner import GuardedPartitioner

        return GuardedPartitioner(force_fp16=self.precision == "fp16", outside=outside)

    def lowering_context(self) -> AbstractContextManager[None]:
        with root_log_level_kept():
            from lowering.targets.vulkan.partitioner import tried_fusions_only

        return tried_fusions_only()

    def check(self, method: str, partitioned: ExportedProgram) -> None:
        from lowering.targets.vulkan.checker import check_delegates

        check_delegates(method, partitioned)
