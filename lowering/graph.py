"""A lowered method for networkx: which delegate call computes each node, or why none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx
import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.report import NO_DELEGATE, Refusal
from mobizo_passes.graph.facts import module_of, source_of
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name, overload_name


def method_graph(edge: ExportedProgram, reasons: Mapping[str, Refusal]) -> networkx.DiGraph:
    """Return inputs and calls of one partitioned edge program, those inside of delegate calls included.

    Node attributes: `op`, `shape` (list of int or None), `dtype`, `origin` (module FQN, "" if unknown), `flops`,
    `source` (the line of the model that it comes from, or ""), `delegate` (number of the delegate call, or None),
    `rule` and `reason` (the rule for which no delegate took it, and why, or None). Nodes inside of a delegate call are
    named ``<call>.<node>``; weights are left out.
    """
    graph = networkx.DiGraph()
    user: set[Any] = set(edge.graph_signature.user_inputs)
    # What stands for a node's value: inside of delegate calls it has another name.
    stands: dict[Node, str | dict[int, str]] = {}
    calls = 0
    for node in edge.graph.nodes:
        if node.op == "placeholder" and node.name in user:
            stands[node] = _add(graph, node.name, node, None, None)
        elif node.op == "call_function" and operation_name(node) == "executorch_call_delegate":
            stands[node] = _add_delegate(graph, edge, node, calls, stands)
            calls += 1
        elif node.op == "call_function" and operation_name(node) == "getitem":
            source: Any = node.args[0]
            inner = stands[source]
            stands[node] = inner[node.args[1]] if isinstance(inner, dict) else inner
        elif node.op == "call_function":
            name = _add(graph, node.name, node, None, reasons.get(node.name, NO_DELEGATE))
            stands[node] = name
            _connect(graph, name, [stands[s] for s in node.all_input_nodes if s in stands])
    return graph


def _add_delegate(
    graph: networkx.DiGraph,
    edge: ExportedProgram,
    call: Node,
    number: int,
    stands: Mapping[Node, str | dict[int, str]],
) -> dict[int, str]:
    """Add what one delegate call computes; returns the names of its results by position."""
    module: Any = call.args[0]
    program: ExportedProgram = getattr(edge.graph_module, module.target).original_module
    given = dict(zip(program.graph_signature.user_inputs, call.args[1:], strict=True))
    inside: dict[Node, str] = {}
    for node in program.graph.nodes:
        source: Any = given.get(node.name)
        if node.op == "placeholder" and source in stands:
            inside[node] = stands[source]  # type: ignore[assignment]
        elif node.op == "call_function":
            name = inside[node] = _add(graph, f"{call.name}.{node.name}", node, number, None)
            _connect(graph, name, [inside[s] for s in node.all_input_nodes if s in inside])
    results: Any = program.graph.output_node().args[0]
    return {place: inside[node] for place, node in enumerate(results) if node in inside}


def _add(graph: networkx.DiGraph, name: str, node: Node, delegate: int | None, refusal: Refusal | None) -> str:
    value = node.meta.get("val")
    is_tensor = isinstance(value, torch.Tensor)
    graph.add_node(
        name,
        op=overload_name(node) if node.op == "call_function" else node.op,
        shape=[int(s) for s in value.shape] if is_tensor else None,
        dtype=str(value.dtype).removeprefix("torch.") if is_tensor else None,
        origin=module_of(node),
        flops=node_flops(node) if node.op == "call_function" else 0,
        source=source_of(node),
        delegate=delegate,
        rule=None if refusal is None else refusal.rule,
        reason=None if refusal is None else refusal.why,
    )
    return name


def _connect(graph: networkx.DiGraph, name: str, sources: list[Any]) -> None:
    for source in sources:
        graph.add_edges_from((each, name) for each in (source.values() if isinstance(source, dict) else [source]))
