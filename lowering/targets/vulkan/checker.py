"""Reads serialized Vulkan delegates and holds them against what the Vulkan runtime is known to get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from executorch.backends.vulkan.serialization.vulkan_graph_schema import VkGraph
from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
    extract_vk_flatbuffer,
    flatbuffer_to_vk_graph,
)
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.errors import RuleBroken
from lowering.targets.vulkan import BACKEND, NAME
from lowering.targets.vulkan.graph import Graph
from lowering.targets.vulkan.rules import RULES
from mobizo_passes.graph.operators import operation_name


def check_delegates(method: str, partitioned: ExportedProgram) -> None:
    """Every Vulkan delegate of a partitioned method keeps every rule, and so does the method around it.

    Raises:
        RuleBroken: naming the first operator or input that does not, and the rule.
    """
    check_signature(method, partitioned)
    for call, module in _delegates(partitioned):
        written = sorted(module.original_module.graph_signature.buffers_to_mutate.values())
        if written:
            raise RuleBroken(NAME, method, f"{call.name}, buffer {written[0]}", STATE_OUTSIDE)
        check_graph(method, call.name, read(module.processed_bytes))


def check_signature(method: str, program: ExportedProgram) -> None:
    """No input of the method has the name of a buffer that it writes.

    Raises:
        RuleBroken: one has.
    """
    signature = program.graph_signature
    written = {fqn.replace(".", "_") for fqn in signature.buffers_to_mutate.values()}
    for name in signature.user_inputs:
        if str(name) in written:
            raise RuleBroken(NAME, method, f"input {name}", INPUT_NAMED_AS_BUFFER)


def check_graph(method: str, call: str, graph: VkGraph) -> None:
    """Every operator of one delegate's graph keeps every rule.

    Raises:
        RuleBroken: one does not.
    """
    for rule in RULES:
        for where in rule.broken(Graph(graph)):
            raise RuleBroken(NAME, method, f"{call}, {where}", f"{rule.name}: {rule.why}")


def read(blob: bytes) -> VkGraph:
    """The graph inside of a delegate's bytes."""
    return flatbuffer_to_vk_graph(extract_vk_flatbuffer(blob))


STATE_OUTSIDE = "state-outside: the runtime fails on buffers that a delegate writes, or reads stale ones"
INPUT_NAMED_AS_BUFFER = "input-names: what is written to a buffer is lost when an input has the buffer's name"


def _delegates(program: ExportedProgram) -> Iterator[tuple[Node, Any]]:
    for node in program.graph.nodes:
        if operation_name(node) == "executorch_call_delegate":
            target: Any = node.args[0]
            module = getattr(program.graph_module, target.target)
            if module.backend_id == BACKEND:
                yield node, module
