"""ExecuTorch's Vulkan partitioner, kept from what the Vulkan runtime gets wrong, with a memory for reasons."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import (
    VulkanPartitioner,
    VulkanSupportedOperators,
    vk_patterns,
)
from executorch.backends.vulkan.utils import DEFAULT_BUFFER_LIMIT, SMALL_TEXTURE_LIMITS
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner, Partition

from lowering.executorch_compat.vulkan import only_fusions
from lowering.report import Refusal
from lowering.targets.partitions import (
    MIN_FLOPS,
    TIED,
    alone,
    downstream,
    splitting_nodes,
    upstream,
    worthwhile,
    would_split,
)
from lowering.targets.tied import parameter_of
from lowering.targets.vulkan.operators import why_not
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name, overload_name

_IN_EPILOGUE = Refusal(
    "float32-loss",
    "it comes after the last matrix product: the loss is computed in float32, outside of a float16 delegate",
)
_IN_FLOAT32 = Refusal(
    "float32-noise",
    "no matrix product leads to it: noise, perturbed tensors and masks are made in float32, outside of a float16 "
    "delegate, which would hand them back rounded",
)


def tried_fusions_only() -> AbstractContextManager[None]:
    """Within, ExecuTorch's Vulkan stage fuses RMS norms and nothing else: its fused rotary embeddings are not among
    the operators tried."""
    return only_fusions("rms_norm")


class GuardedPartitioner(Partitioner):
    """Delegates partitions that hold matrix products of at least `min_flops`, or the largest one, in tried operators.

    After `partition`, `reasons` says of each node left behind, by name, why. `outside` are FQNs of weights whose
    `linear`s are left out (see `lowering.targets.tied`). State stays outside, as input and output of the delegate: the
    runtime fails on buffers that it is to write, or reads stale ones.
    """

    def __init__(
        self, force_fp16: bool = False, min_flops: int = MIN_FLOPS, outside: frozenset[str] = frozenset()
    ) -> None:
        self.force_fp16 = force_fp16
        self.min_flops = min_flops
        self.outside = outside
        self.reasons: dict[str, Refusal] = {}
        # The limits of desktop drivers; larger tensors go into buffers, which every driver has.
        options = {"force_fp16": force_fp16, "small_texture_limits": True}
        self.delegation_spec: DelegationSpec = VulkanPartitioner(options).delegation_spec

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:
        """None beyond those that the whole lowering keeps (see `KEPT_WHOLE`): one left outside is no fault."""
        return [], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the nodes to delegate."""
        tags: dict[str, DelegationSpec] = {}
        for partition in self._partitions(exported_program):
            tag = f"vulkan{partition.id}"
            tags[tag] = self.delegation_spec
            for node in partition.nodes:
                node.meta["delegation_tag"] = tag
        # Tags constants alone: a buffer that the program writes is none.
        tag_constant_data(exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def _partitions(self, program: ExportedProgram) -> list[Partition]:
        graph = program.graph
        support = _Support(program, self.outside)
        supported = {node for node in graph.nodes if support.is_node_supported({}, node)}
        splitting = splitting_nodes(graph, supported)
        epilogue = _after_products(graph, supported) if self.force_fp16 else set()
        exact = _before_products(graph, supported) if self.force_fp16 else set()
        support.left = splitting | epilogue | exact
        partitioner = CapabilityBasedPartitioner(program.graph_module, support, allows_single_node_partition=True)
        kept, _ = worthwhile(partitioner.propose_partitions(), self.min_flops)
        taken = {node for each in kept for node in each.nodes}
        for node in graph.nodes:
            if node.op != "call_function" or node in taken:
                continue
            stated = support.reasons.get(node)
            if stated is None:
                stated = (
                    _IN_FLOAT32
                    if node in exact
                    else _IN_EPILOGUE
                    if node in epilogue
                    else would_split("Vulkan")
                    if node in splitting
                    else alone("Vulkan")
                )
            self.reasons[node.name] = stated
        return kept


class _Support(VulkanSupportedOperators):
    """ExecuTorch's own judgement, after ours; both remembered by node."""

    def __init__(self, program: ExportedProgram, outside: frozenset[str]) -> None:
        patterns = vk_patterns.get_all_fusable_subgraphs(program.graph_module)
        super().__init__(SMALL_TEXTURE_LIMITS, DEFAULT_BUFFER_LIMIT, fusable_subgraphs=patterns)
        self.program = program
        self.outside = outside
        self.left: set[Node] = set()
        self.reasons: dict[Node, Refusal] = {}

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: Node) -> bool:
        if node in self.left or node.op != "call_function" or node in self.reasons:
            return False
        if operation_name(node) == "linear" and parameter_of(self.program, node.args[1]) in self.outside:
            self.reasons[node] = TIED
            return False
        reason = why_not(node)
        if reason is not None:
            self.reasons[node] = reason
            return False
        return super().is_node_supported(submodules, node)

    def log_skip(self, node: Node, reason: str) -> None:
        why = f"Vulkan's constraints for {overload_name(node)} refuse it: {reason}"
        self.reasons[node] = Refusal("constraints", why)


def _before_products(graph: Graph, supported: set[Node]) -> set[Node]:
    """Supported nodes that no product leads to: rounded, the noise would differ between `step` and `apply`."""
    products = {node for node in graph.nodes if node_flops(node)}
    return supported - products - downstream(graph.nodes, products)


def _after_products(graph: Graph, supported: set[Node]) -> set[Node]:
    """Supported nodes that lead to no product."""
    products = {node for node in graph.nodes if node_flops(node)}
    return supported - products - upstream(list(graph.nodes), products)
