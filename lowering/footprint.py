"""What a lowered training step takes: FLOPs, and bytes of each kind."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lowering.lowered import Lowered


@dataclass(frozen=True)
class Footprint:
    """One training step: FLOPs of its products (2 per multiply-add), and bytes.

    Attributes:
        weight_bytes: constants that are read from the file, which is mapped into memory.
        packed_bytes: weights that a delegate copies into a form of its own, once for each product that reads them.
        source_bytes: the same weights in the file, once.
        arena_bytes: what ExecuTorch plans for values between kernels and delegate calls.
        live_bytes: the most that values inside of a delegate take at one moment.
        adapter_bytes: the trained tensors.
        optimizer_bytes: the optimizer's state.
    """

    flops: int
    weight_bytes: int
    packed_bytes: int
    source_bytes: int
    arena_bytes: int
    live_bytes: int
    adapter_bytes: int
    optimizer_bytes: int

    @property
    def peak_bytes(self) -> int:
        """An estimate of what the step needs beside the runtime itself, at loading or at a step, whichever takes more.

        While weights are copied, the file's are in memory too; they leave it before the first step.
        """
        later, state = self.arena_bytes + self.live_bytes, self.adapter_bytes + self.optimizer_bytes
        return self.weight_bytes + self.packed_bytes + max(self.source_bytes, later) + 2 * state

    def to_dict(self) -> dict[str, int]:
        """Plain data, for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def footprint(lowered: Lowered) -> Footprint:
    """Read the step's off the report."""
    inputs = lowered.manifest.methods["step"].inputs
    report = lowered.report.methods["step"]
    bytes_of = {
        role: sum(_bytes(each.shape, each.dtype) for each in inputs if each.role == role)
        for role in ("adapter", "optimizer")
    }
    return Footprint(
        flops=report.total_flops,
        weight_bytes=report.memory.mapped,
        packed_bytes=report.memory.held,
        source_bytes=report.memory.sources,
        arena_bytes=report.arena_bytes,
        live_bytes=report.memory.live,
        adapter_bytes=bytes_of["adapter"],
        optimizer_bytes=bytes_of["optimizer"],
    )


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize
