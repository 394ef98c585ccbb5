"""Graphs for networkx."""

from __future__ import annotations

from typing import Any

import networkx
from torch import Tensor

from mobizo_passes.graph.facts import facts, module_of, source_of
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.text import op_name, type_text


def to_networkx(ir: Ir) -> networkx.DiGraph:
    """Return one node per graph node and one edge per use.

    Node attributes: `op`, `shape` (list of int or None), `dtype`, `type` (text), `origin` (module FQN),
    `pass` (its name), `role` (of inputs, else None), `expanded` (bool), `flops` (int) and `source` (the line of the
    model that it comes from, or "").
    """
    graph = networkx.DiGraph()
    for node in ir.graph.nodes:
        value: Any = node.meta.get("val")
        spec = facts(node).role
        graph.add_node(
            node.name,
            op=op_name(node) if node.op == "call_function" else node.op,
            shape=list(value.shape) if isinstance(value, Tensor) else None,
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else None,
            type=type_text(value) if value is not None else "",
            origin=module_of(node),
            **{"pass": facts(node).made_by},
            role=spec.kind if spec is not None else None,
            expanded=facts(node).expanded,
            flops=node_flops(node),
            source=source_of(node),
        )
        for source in node.all_input_nodes:
            graph.add_edge(source.name, node.name)
    return graph
