"""Files for Model Explorer: what stands in them, as its documentation wants it. It is not needed to write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mobizo_passes as mz
from mobizo_passes.views.explorer import NodeData


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_graph_and_node_data(compiled: Any, lowered: Any, tmp_path: Path) -> None:
    program, _, _ = compiled("llama-qv")
    path = program.draw(tmp_path / "step.json", beside=lowered, data={"Time": NodeData({"mp_lora": 2.5}, "ms", "sum")})
    names = ("bytes-of-values", "computed", "delegate", "flops", "made-by", "reason-against", "time")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["step.json", *(f"step.{n}.json" for n in names)])

    content = read(path)
    assert content["label"] == "LlamaForCausalLM: one training step"
    step, other = content["graphs"]
    assert (step["id"], other["id"]) == ("step", "lowered")
    nodes = {node["id"]: node for node in step["nodes"]}
    assert len(nodes) == len(step["nodes"])
    graph = program.to_networkx()
    assert set(graph) - {"output"} == {name for name in nodes if not name.startswith("output ")}
    for name, node in nodes.items():
        sources = [edge["sourceNodeId"] for edge in node["incomingEdges"]]
        assert set(sources) <= set(nodes)
        assert name.startswith("output ") or sources == list(graph.predecessors(name))
    product = nodes["mp_lora"]
    assert product["label"] == "mobizo.mp_lora"
    assert product["namespace"] == graph.nodes["mp_lora"]["origin"].replace(".", "/")
    shown = {each["key"]: each["value"] for each in product["attrs"]}
    assert (shown["computed"], shown["made by"]) == ("per group", "insert-mp-lora")
    assert shown["source"].startswith(("tests/models.py:", "peft/"))
    weight = nodes["model_layers_0_input_layernorm_weight"]
    assert (weight["label"], weight["namespace"].rpartition("/")[2]) == ("weight", "input_layernorm")
    outputs = [node["label"] for name, node in nodes.items() if name.startswith("output ")]
    assert outputs[:3] == ["output loss", "output losses", "output projected_gradients"]
    assert len(outputs) == 3 + len(program.sites)

    computed = read(tmp_path / "step.computed.json")["step"]
    assert computed["results"]["mp_lora"] == {"value": "per group", "bgColor": "#ffd8a6"}
    flops = read(tmp_path / "step.flops.json")["step"]
    assert flops["results"]["linear"] == {"value": graph.nodes["linear"]["flops"]}
    assert [stop["stop"] for stop in flops["gradient"]] == [0, 1]
    assert read(tmp_path / "step.time.json")["step"]["name"] == "Time [ms]"
    assert read(tmp_path / "step.reason-against.json") == {
        "lowered": {
            "name": "reason against",
            "results": {"topk": {"value": "dtype: no int64 kernels", "bgColor": "#e3e8ed"}},
            "gradient": [],
        }
    }
    with pytest.raises(mz.InputError, match="data 'ms' names 1 nodes that the program has not"):
        program.draw(path, data={"ms": NodeData({"nowhere": 1.0})})
