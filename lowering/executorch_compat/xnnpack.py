"""ExecuTorch's XNNPACK partitioner and its serialization, beyond what they document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from executorch.backends.xnnpack.partition.config import (
    gemm_configs,
    generic_node_configs,
    node_configs,
    xnnpack_config,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram
from torch.fx import Node

# Given this compile spec, ExecuTorch's XNNPACK stage runs one graph pass (mm/addmm to linear) instead of seventeen,
# each of which retraces the partition: a third of the whole lowering time. The runtime does not read it. Should a later
# ExecuTorch drop it, the passes run, with the same result.
PLAIN_GRAPH = CompileSpec("dqlinear_partitioner", b"")

_EXPLAINERS = (generic_node_configs.why, gemm_configs.why, node_configs.why, xnnpack_config.why)


def skip_source_search(configs: Mapping[str, Any]) -> None:
    """Take a partitioner's `mm` for what it is: ExecuTorch searches the whole graph, for each of them, for a module
    whose source it would be a part of, and legalized programs name no such source.
    """
    config = configs["mm.default"]
    config.get_deps = MethodType(gemm_configs.GEMMConfig.get_deps, config)


def read_in_place(configs: Mapping[str, Any], in_place: Callable[[ExportedProgram, Any], bool]) -> None:
    """Let a partition have those weights of `linear` and `mm` as inputs for which `in_place` says so.

    ExecuTorch's own option does that to all weights or to none. It takes the biases away from convolutions too, and
    XNNPACK makes no convolution without a constant one.
    """
    for name in ("linear.default", "mm.default", "addmm.default"):
        config = configs[name]
        for part in ("_get_weight_deps", "_get_bias_deps"):
            setattr(config, part, MethodType(_left_out(getattr(config, part), in_place), config))


def _left_out(found: Callable[..., Any], in_place: Callable[[ExportedProgram, Any], bool]) -> Callable[..., Any]:
    def deps(config: Any, node: Node, program: ExportedProgram, precision: Any) -> tuple[bool, list[Node]]:
        left = in_place(program, node.args[config.weight_idx])
        return (True, []) if left else found(node, program, precision)

    return deps


def leave_maxima(configs: Mapping[str, Any]) -> None:
    """Leave maxima over a dimension outside: they are written as poolings, which raises for most dimensions, and gives
    other values for the rest.
    """

    def check(node: Node, _: ExportedProgram) -> bool:
        node_configs.why(node, "its serializer writes a maximum over a dimension as a pooling of other values")
        return False

    configs["max.dim"].check_constraints = check


def refusal_of(config: Any, node: Node, program: ExportedProgram) -> str | None:
    """What a partitioner's configuration has against a node, "" if it does not say; None if it takes the node.

    ExecuTorch writes the reason to its log alone; the objects that write it remember the last one.
    """
    for explainer in _EXPLAINERS:
        explainer.node = None
    if config.check_constraints(node, program):
        return None
    return next((explainer.reason for explainer in _EXPLAINERS if explainer.node is node), "")
