"""Which nodes of a method become one HTP context binary."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from executorch.backends.qualcomm.partition.qnn_partitioner import QnnOperatorSupport
from executorch.backends.qualcomm.qnn_preprocess import QnnBackend
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.errors import OperatorNotTaken
from lowering.executorch_compat.retracing import KEPT_WHOLE
from lowering.report import Refusal
from lowering.targets.partitions import downstream, tensors_of, upstream, wrong_dtype
from mobizo_passes.graph.facts import module_of, source_line
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name, overload_name

_TAG = "qnn_0"
_BEFORE = Refusal(
    "float32-noise", "before the first matrix product: noise, perturbation and embedding stay in float32 and integers"
)
_AFTER = Refusal(
    "float32-loss",
    "after the last matrix product: the losses' reduction, the projected gradients and the update stay in float32",
)
_NO_PRODUCT = Refusal("matrix-product", "the method has no matrix product")
_REFUSED = Refusal("operator", "QNN's operator check refuses it for this SoC")
_SOFTMAXES = ("_log_softmax", "_softmax")
_NORMS = ("rms_norm", "native_layer_norm")

# Classes from which on a softmax is worth QNN's rounding.
WIDE = 1024
# What QNN takes and ExecuTorch would decompose.
WHOLE = (*KEPT_WHOLE, torch.ops.aten.rms_norm.default)


class HtpPartitioner(Partitioner):
    """Delegates everything from the first norm or matrix product to the last, in one piece.

    Halves are too coarse for perturbations, loss differences and updates, and QNN has no 64-bit integers for the noise
    hash: what comes before and after stays on ExecuTorch's kernels. So does a softmax at the end, of which the loss
    would otherwise see a rounded logarithm, unless it is over `wide` classes or more: then ExecuTorch's kernel would
    take longer than the rest. After `partition`, `reasons` says of each node left behind, by name, why.
    """

    def __init__(self, method: str, compile_specs: list[CompileSpec], wide: int = WIDE) -> None:
        super().__init__()
        self.method = method
        self.compile_specs = compile_specs
        self.wide = wide
        self.delegation_spec = DelegationSpec(QnnBackend.__name__, compile_specs)
        self.reasons: dict[str, Refusal] = {}

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], None]:
        return list(WHOLE), None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        ep = exported_program
        calls = [node for node in ep.graph.nodes if node.op == "call_function"]
        inside, reasons = body_of(calls, self.wide)
        self.reasons.update(reasons)
        body = [node for node in calls if node in inside or _restores(node, inside)]
        support = QnnOperatorSupport(ep, self.compile_specs, set(), set()) if body else None
        taken = {node for node in body if support is not None and support.is_node_supported(None, node)}
        refused = [node for node in body if node not in taken]
        self._check_whole(calls, taken)
        for node in refused:
            self.reasons[node.name] = _REFUSED
        for node in taken:
            node.meta["delegation_tag"] = _TAG
        tag_constant_data(ep)
        tags = {_TAG: self.delegation_spec} if taken else {}
        return PartitionResult(tagged_exported_program=ep, partition_tags=tags)

    def _check_whole(self, calls: list[Node], taken: set[Node]) -> None:
        """Raise when a node outside of the body stands between two nodes inside: it would cut the binary in two."""
        between = downstream(calls, taken) & upstream(calls, taken)
        for node in calls:
            if node in between and node not in taken:
                raise OperatorNotTaken(
                    self.method,
                    node.name,
                    overload_name(node),
                    _described(node),
                    module_of(node),
                    source_line(node),
                    self.reasons.get(node.name, _REFUSED).why,
                )


def body_of(calls: Sequence[Node], wide: int = WIDE) -> tuple[dict[Node, None], dict[str, Refusal]]:
    """What of a method's calls the binary computes, in order; and of each other call, by name, why not."""
    products = {node for node in calls if node_flops(node) or operation_name(node) in _NORMS}
    after = downstream(calls, products)
    ends = products | {node for node in after if _is_wide_softmax(node, wide)}
    before = upstream(calls, ends)
    body: dict[Node, None] = {}
    reasons: dict[str, Refusal] = {}
    for node in calls:
        inside = (node in products or node in after) and (node in ends or node in before)
        wrong = wrong_dtype(node, (torch.float32,))
        if inside and wrong is None:
            body[node] = None
        elif wrong is not None:
            reasons[node.name] = Refusal("dtype", f"{wrong} stays outside: QNN computes the floating-point body")
        elif not products:
            reasons[node.name] = _NO_PRODUCT
        else:
            reasons[node.name] = _BEFORE if node in before else _AFTER
    return body, reasons


def _is_wide_softmax(node: Node, wide: int) -> bool:
    return operation_name(node) in _SOFTMAXES and tensors_of(node)[0].shape[-1] >= wide


def _restores(node: Node, body: Container[Node]) -> bool:
    """Whether a node gives the body a stored weight back from its integers."""
    return operation_name(node).startswith("dequantize") and all(user in body for user in node.users)


def _described(node: Node) -> str:
    return ", ".join(f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" for v in tensors_of(node))
