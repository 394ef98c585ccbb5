"""Programs as files for Google's Model Explorer: graphs in its JSON format, and node data to color them with.

The format is that of `ai-edge-model-explorer`, which is needed to look at the files and not to write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.views.explorer.columns import NodeData, columns_of, columns_of_rows
from mobizo_passes.views.networkx_graph import to_networkx

_FEW, _MANY = "#ffffff", "#f08c2e"
# The first two are those of what is computed once and once per group.
_WORDS = ("#e3e8ed", "#ffd8a6", "#cfe0fa", "#d8ecc9", "#e6d6f5", "#f9d3dd", "#cdebea", "#eee3c7", "#dcdff7")


def write(
    path: Path,
    title: str,
    step: Ir,
    beside: tuple[str, Ir | networkx.DiGraph] | None = None,
    data: Mapping[str, NodeData] | None = None,
) -> list[Path]:
    """Write the step, and a second graph beside it, to `path`, and node data beside that; return all files.

    A graph has the module path of each node as its namespace. Node data are in one file for each title:
    ``step.json`` has ``step.computed.json``, ``step.flops.json`` and so on. Raises `InputError` for `data` about nodes
    that the program has not.
    """
    graphs: list[dict[str, Any]] = []
    colored: dict[str, dict[str, Any]] = {}
    for name, graph in (("step", step), *([beside] if beside is not None else [])):
        nodes, columns = _ir(graph, data or {}) if isinstance(graph, Ir) else _networkx(graph)
        data = None
        graphs.append({"id": name, "nodes": nodes})
        for column in columns:
            colored.setdefault(column["name"], {})[name] = _node_data(column, [node["id"] for node in nodes])
    files = {path: {"label": title, "graphs": graphs}}
    for name, each in colored.items():
        files[path.with_suffix(f".{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json")] = each
    for file, content in files.items():
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return list(files)


def _ir(ir: Ir, data: Mapping[str, NodeData]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    graph = to_networkx(ir)
    output = ir.graph.output_node()
    graph.remove_node(output.name)
    inputs = {node.name: role(node).name for node in ir.placeholders()}
    nodes = [_node(name, graph.nodes[name], graph.predecessors(name), inputs.get(name, "")) for name in graph]
    columns = columns_of([node for node in ir.graph.nodes if node is not output], data)
    results: Any = output.args[0]
    for number, (spec, source) in enumerate(zip(ir.outputs, results, strict=True)):
        label = f"output {spec.kind}" + (f" {spec.name}" if spec.name != spec.kind else "")
        nodes.append(_plain(f"output {number}", label, "", [], [source.name]))
    return nodes, columns


def _networkx(graph: networkx.DiGraph) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    nodes = [_node(str(name), graph.nodes[name], map(str, graph.predecessors(name)), "") for name in graph]
    return nodes, columns_of_rows([graph.nodes[name] for name in graph])


def _node(name: str, row: Mapping[str, Any], sources: Iterable[str], fqn: str) -> dict[str, Any]:
    """A node of `to_networkx`; `fqn` is the name of a parameter, buffer or adapter tensor."""
    module, _, last = fqn.rpartition(".")
    op, origin = str(row.get("op", "")), str(row.get("origin") or module)
    shape = row.get("shape")
    value = row.get("type") or (f"{row.get('dtype')}{shape}" if shape is not None else "")
    computed = None if "expanded" not in row else "per group" if row["expanded"] else "once"
    shown = {
        "name": f"%{name}",
        "type": value,
        "input": " ".join(dict.fromkeys(filter(None, (row.get("role"), fqn)))),
        "module": origin,
        "source": row.get("source"),
        "made by": row.get("pass"),
        "computed": computed if op != "placeholder" else None,
        "FLOPs": row.get("flops") or None,
        "delegate call": row.get("delegate"),
        "not delegated": row.get("reason"),
    }
    attributes = [{"key": key, "value": str(each)} for key, each in shown.items() if each not in (None, "")]
    label = op if op != "placeholder" else last or str(row.get("role") or name)
    node = _plain(name, label, origin.replace(".", "/"), attributes, sources)
    tags = [{"key": "__tensor_tag", "value": name}, {"key": "tensor_shape", "value": value}]
    return {**node, "outputsMetadata": [{"id": "0", "attrs": tags}]}


def _plain(
    name: str, label: str, namespace: str, attributes: Sequence[Mapping[str, str]], sources: Iterable[str]
) -> dict[str, Any]:
    edges = [
        {"sourceNodeId": each, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)} for i, each in enumerate(sources)
    ]
    return {"id": name, "label": label, "namespace": namespace, "attrs": attributes, "incomingEdges": edges}


def _node_data(column: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    # Outputs, at the end, have no values.
    values = {name: value for name, value in zip(names, column["values"], strict=False) if value is not None}
    words = list(dict.fromkeys(value for value in values.values() if isinstance(value, str)))
    results = {
        name: {"value": value, "bgColor": _WORDS[words.index(value) % len(_WORDS)]} if words else {"value": value}
        for name, value in values.items()
    }
    gradient = [] if words else [{"stop": 0, "bgColor": _FEW}, {"stop": 1, "bgColor": _MANY}]
    unit = f" [{column['unit']}]" if column["unit"] else ""
    return {"name": f"{column['name']}{unit}", "results": results, "gradient": gradient}
