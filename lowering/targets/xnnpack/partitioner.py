"""ExecuTorch's XNNPACK partitioner, with a memory for reasons and a minimum size for partitions."""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.partitioner import DelegationSpec
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition

from lowering.executorch_compat.retracing import KEPT_WHOLE
from lowering.executorch_compat.xnnpack import (
    PLAIN_GRAPH,
    leave_maxima,
    read_in_place,
    refusal_of,
    skip_source_search,
)
from lowering.report import Refusal
from lowering.targets.partitions import (
    MIN_FLOPS,
    TIED,
    alone,
    one_body,
    splitting_nodes,
    trailing_nodes,
    worthwhile,
    would_split,
    wrong_dtype,
)
from lowering.targets.tied import parameter_of, product_weight
from mobizo_passes.graph.operators import overload_name

_FLOAT = (torch.float32, torch.float16)

# What XNNPACK's serializer takes as it is, after one graph pass: see `executorch_compat.xnnpack.PLAIN_GRAPH`. What its
# other passes do (fused activations and batch norms, long concatenations, channels-last convolutions, clones,
# quantization) does not occur among these.
_PLAIN_OPERATORS = frozenset(
    f"aten.{name}"
    for name in (
        "linear.default",
        "mm.default",
        "bmm.default",
        "add.Tensor",
        "sub.Tensor",
        "mul.Tensor",
        "div.Tensor",
        "neg.default",
        "abs.default",
        "exp.default",
        "log.default",
        "sqrt.default",
        "rsqrt.default",
        "sin.default",
        "cos.default",
        "tanh.default",
        "sigmoid.default",
        "gelu.default",
        "relu.default",
        "clamp.default",
        "maximum.default",
        "minimum.default",
        "_softmax.default",
        "permute_copy.default",
        "view_copy.default",
        "slice_copy.Tensor",
    )
)


class ProductPartitioner(XnnpackPartitioner):
    """Delegates only partitions that hold matrix products or convolutions of at least `min_flops`, or the largest one.

    A partition costs about a second of lowering and two tensor copies per call; the elementwise remainders around the
    noise and the update run as fast on ExecuTorch's own kernels. After `partition`, `reasons` says of each node left
    behind, by name, why. `outside` are FQNs of weights whose `linear`s are left out (see `lowering.targets.tied`).
    Weights `in_place` are inputs of the partition: XNNPACK reads them from the file and packs each anew at each
    product, in a buffer that all share. It packs the others when the program is loaded.
    """

    def __init__(
        self,
        outside: frozenset[str] = frozenset(),
        in_place: frozenset[str] = frozenset(),
        min_flops: int = MIN_FLOPS,
    ) -> None:
        super().__init__()
        skip_source_search(self.target_partitioner_configs)
        if in_place:
            read_in_place(self.target_partitioner_configs, lambda ep, weight: parameter_of(ep, weight) in in_place)
        leave_maxima(self.target_partitioner_configs)
        self.min_flops = min_flops
        self.outside = outside
        self.reasons: dict[str, Refusal] = {}

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:
        """The operators to keep whole: those that XNNPACK takes at every place where they occur.

        XNNPACK's own answer comes with a per-node filter, for which ExecuTorch retraces the program three times
        instead of once.
        """
        operators, takes = super().ops_to_not_decompose(ep)
        refused = {node.target for node in ep.graph.nodes if node.target in operators and takes and not takes(node)}
        # The whole lowering keeps these (see `KEPT_WHOLE`), and one left outside is no fault: ExecuTorch has a kernel.
        refused.update(KEPT_WHOLE)
        return [operator for operator in operators if operator not in refused], None

    def get_matched_nodes_from_configs(self, ep: ExportedProgram) -> list[list[Node]]:
        groups = super().get_matched_nodes_from_configs(ep)
        groups = [group for group in groups if not any(self._reads_outside(node, ep) for node in group)]
        splitting = splitting_nodes(ep.graph, {node for group in groups for node in group})
        self.reasons.update((node.name, would_split("XNNPACK")) for node in splitting)
        trailing = trailing_nodes(ep.graph, {node for group in groups for node in group})
        self.reasons.update((node.name, alone("XNNPACK")) for node in trailing)
        return [group for group in groups if splitting.isdisjoint(group) and trailing.isdisjoint(group)]

    def _reads_outside(self, node: Node, ep: ExportedProgram) -> bool:
        return product_weight(ep, node) in self.outside

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        supported = {node for group in self.get_matched_nodes_from_configs(ep) for node in group}
        body = one_body(ep.graph, supported)
        if body is None:
            kept, others = worthwhile(super().generate_partitions(ep), self.min_flops)
            small = {node.name for partition in others for node in partition.nodes}
        else:
            kept = [Partition(id=0, nodes=dict.fromkeys(body))]
            small = {node.name for node in supported.difference(body)}
        if all(self._plain(node) for partition in kept for node in partition.nodes):
            self.delegation_spec = DelegationSpec(self.delegation_spec.backend_id, [PLAIN_GRAPH])
        taken = {node.name for partition in kept for node in partition.nodes}
        for node in ep.graph.nodes:
            if node.op == "call_function" and node.name not in taken and node.name not in self.reasons:
                self.reasons[node.name] = self._reason(node, ep, node.name in small)
        return kept

    def _plain(self, node: Node) -> bool:
        """Whether XNNPACK's serializer takes the node as it is, with none of XNNPACK's own graph passes."""
        if node.op != "call_function":
            return True
        name = overload_name(node)
        if name == "aten.cat.default":
            pieces: Any = node.args[0]
            return len(pieces) <= 5
        return name in _PLAIN_OPERATORS

    def _reason(self, node: Node, ep: ExportedProgram, small: bool) -> Refusal:
        if self._reads_outside(node, ep):
            return TIED
        if small:
            return alone("XNNPACK")
        wrong = wrong_dtype(node, _FLOAT)
        if wrong is not None:
            return Refusal("dtype", f"XNNPACK has no {wrong} kernels")
        target: Any = node.target
        config: Any = self.target_partitioner_configs.get(format_target_name(target.__name__))
        if config is None:
            return Refusal("operator", f"{overload_name(node)} is not in XNNPACK's partitioner")
        stated = refusal_of(config, node, ep)
        if stated is None:
            return Refusal("no-cycle", "XNNPACK could take it, but no partition could hold it without a cycle")
        why = f"XNNPACK's constraints for {overload_name(node)} refuse it" + (f": {stated}" if stated else "")
        return Refusal("constraints", why)
