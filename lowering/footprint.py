"""What a lowered training step takes: FLOPs, and bytes of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lowering.lowered import Lowered
    from lowering.stages import Program

# Their results are their arguments' memory.
_VIEWS = frozenset({"view", "view_copy", "reshape", "squeeze", "squeeze_copy", "unsqueeze", "unsqueeze_copy", "alias"})


@dataclass(frozen=True)
class Footprint:
    """One training step: FLOPs of its products (2 per multiply-add), and bytes.

    Attributes:
        weight_bytes: what is in the file, mapped into memory.
        packed_bytes: of each weight that a product reads, the copy that XNNPACK makes for it; 0 on other targets. A
            weight that a backward product reads too is packed again.
        arena_bytes: what ExecuTorch plans for values between kernels and delegate calls.
        live_bytes: the most that intermediate results of the graph take at one moment, inside delegates or out.
        adapter_bytes: the trained tensors.
        optimizer_bytes: the optimizer's state.
    """

    flops: int
    weight_bytes: int
    packed_bytes: int
    arena_bytes: int
    live_bytes: int
    adapter_bytes: int
    optimizer_bytes: int

    @property
    def peak_bytes(self) -> int:
        """An estimate of what the step needs beside the runtime itself: all of the above, the adapter twice.

        Values of the arena are alive at some moment too, so that the larger of the two counts.
        """
        state = self.adapter_bytes + self.optimizer_bytes
        return self.weight_bytes + self.packed_bytes + max(self.arena_bytes, self.live_bytes) + 2 * state

    def to_dict(self) -> dict[str, int]:
        """Plain data, for JSON."""
        return {**asdict(self), "peak_bytes": self.peak_bytes}


def footprint(program: Program, lowered: Lowered) -> Footprint:
    """Measure the step of a program and of what it was lowered to."""
    core = program.core("step")
    step = lowered.manifest.methods["step"]
    bytes_of = {
        role: sum(_bytes(each.shape, each.dtype) for each in step.inputs if each.role == role)
        for role in ("adapter", "optimizer")
    }
    return Footprint(
        flops=sum(node_flops(node) for node in core.graph.nodes),
        weight_bytes=lowered.report.weight_bytes,
        packed_bytes=_packed(core) if lowered.manifest.target == "xnnpack" else 0,
        arena_bytes=lowered.report.methods["step"].arena_bytes,
        live_bytes=_most_alive(core),
        adapter_bytes=bytes_of["adapter"],
        optimizer_bytes=bytes_of["optimizer"],
    )


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


def _packed(core: ExportedProgram) -> int:
    """Bytes of the constants that products read, once for each kind of product that reads them."""
    signature = core.graph_signature
    names: Mapping[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    found: dict[tuple[str, str], int] = {}
    for node in core.graph.nodes:
        if node.op != "call_function" or not node_flops(node):
            continue
        for source in node.all_input_nodes:
            constant = source
            # A transposed weight is another reading of it: forward and backward want different ones.
            turns = 0
            while constant.op == "call_function" and len(constant.all_input_nodes) == 1:
                turns += operation_name(constant) in ("permute", "transpose", "t")
                constant = constant.all_input_nodes[0]
            if constant.name in names:
                value = constant.meta["val"]
                found[names[constant.name], f"{operation_name(node)} {turns % 2}"] = value.numel() * value.itemsize
    return sum(found.values())


def _most_alive(core: ExportedProgram) -> int:
    """The largest sum of bytes of computed values between a first write and a last read, in the graph's order."""
    nodes = [node for node in core.graph.nodes if node.op == "call_function"]
    owner: dict[Any, Any] = {}
    last: dict[Any, int] = {}
    for place, node in enumerate(nodes):
        is_view = operation_name(node) in _VIEWS
        owner[node] = owner.get(node.args[0]) if is_view else node
        for source in node.all_input_nodes:
            if owner.get(source) is not None:
                last[owner[source]] = place
    for source in core.graph.output_node().all_input_nodes:
        if owner.get(source) is not None:
            last[owner[source]] = len(nodes)
    ends: dict[int, int] = {}
    alive = most = 0
    for place, node in enumerate(nodes):
        value = node.meta.get("val")
        if owner[node] is node and isinstance(value, Tensor):
            size = value.numel() * value.itemsize
            alive += size
            end = last.get(node, place)
            ends[end] = ends.get(end, 0) + size
        most = max(most, alive)
        alive -= ends.pop(place, 0)
    return most
