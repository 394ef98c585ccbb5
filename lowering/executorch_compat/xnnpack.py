"""ExecuTorch's XNNPACK partitioner and its serialization, beyond what they document."""

from __future__ import annotations

from collections.abc import Mapping
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


def keep_convolution_biases(configs: Mapping[str, Any]) -> None:
    """Leave a convolution its bias where weights are mapped: ExecuTorch takes biases away from all products then, and
    XNNPACK makes no convolution without a constant one; the method could not be loaded.
    """
    for config in configs.values():
        if isinstance(config, gemm_configs.ConvolutionConfig):
            config.force_non_static_weights_for_f32_linear = False


def refusal_of(config: Any, node: Node, program: ExportedProgram) -> str | None:
    """What a partitioner's configuration has against a node, "" if it does not say; None if it takes the node.

    ExecuTorch writes the reason to its log alone; the objects that write it remember the last one.
    """
    for explainer in _EXPLAINERS:
        explainer.node = None
    if config.check_constraints(node, program):
        return None
    return next((explainer.reason for explainer in _EXPLAINERS if explainer.node is node), "")
