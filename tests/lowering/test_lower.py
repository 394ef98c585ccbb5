"""`lower` from end to end: the file runs, agrees with eager, and says what it is."""

from __future__ import annotations

import hashlib
import html
import json
from pathlib import Path

import networkx
import pytest
import torch

import lowering
from lowering.errors import FrozenInput, InvalidProgram, LoweringError, MethodMismatch, TargetUnavailable
from lowering.lowered import Lowered
from lowering.targets import TARGETS, Availability
from runtime_driver.format import Manifest
from tests.lowering.small import Program

TARGET_NAMES = ("xnnpack", "portable")


@pytest.fixture(scope="module")
def program() -> Program:
    return Program()


@pytest.fixture(scope="module", params=TARGET_NAMES)
def lowered(request, program) -> Lowered:
    return lowering.lower(program, target=request.param, application={"words": ["yes", "no"]})


@pytest.fixture(scope="module")
def saved(lowered, tmp_path_factory) -> Path:
    return lowered.save(tmp_path_factory.mktemp("saved") / "sub" / "model.pte")


@pytest.fixture
def runtime(saved):
    from executorch.runtime import Runtime

    return Runtime.get().load_program(saved)


@pytest.mark.parametrize("method", ["step", "apply", "loss", "logits"])
def test_methods_agree_with_eager(program, runtime, method):
    found = runtime.load_method(method).execute(list(program.inputs(method).values()))
    expected = program.expected(method)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        tolerance = 2e-3 if method == "step" else 1e-5  # a projected gradient is a difference of losses over 2 eps
        assert float((f - e).abs().max()) <= tolerance * float(e.abs().max())
    if method in ("step", "loss"):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["step", "loss"])
def test_every_input_matters(program, runtime, method):
    """No input was frozen: changing any of them changes the result."""
    inputs = program.inputs(method)
    baseline = runtime.load_method(method).execute(list(inputs.values()))
    for name, value in inputs.items():
        changed = {**inputs, name: value * 2 + 1 if value.is_floating_point() else 1 - value.clamp(0, 1)}
        found = runtime.load_method(method).execute(list(changed.values()))
        assert any(not torch.equal(a, b) for a, b in zip(baseline, found, strict=True)), name


def test_results_repeat_bit_for_bit(program, runtime):
    step = runtime.load_method("step")
    first, second = (step.execute(list(program.inputs("step").values())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_replay_gives_the_step_s_adapter(program, runtime):
    inputs = program.inputs("step")
    step = runtime.load_method("step").execute(list(inputs.values()))
    adapter = [inputs[name] for name in program.adapter]
    replayed = runtime.load_method("apply").execute([*adapter, inputs["seed"], inputs["lr"], step[2]])
    for found, expected in zip(replayed, step[3:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_initial_adapter_is_inside(program, runtime):
    found = runtime.load_method("initial_adapter").execute([])
    expected = [*program.initial_adapter().values(), *program.frozen_adapter().values()]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_manifest_is_inside_and_beside(saved, runtime, lowered):
    (inside,) = runtime.load_method("mobizo_manifest").execute([])
    beside = saved.with_suffix(".json").read_text()
    assert inside == lowered.manifest_json()
    whole = saved.read_bytes()
    program_file = {"sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole)}
    assert json.loads(beside) == {**json.loads(inside), "program_file": program_file}
    manifest = Manifest.model_validate(json.loads(inside))
    assert manifest.application == {"words": ["yes", "no"]}
    assert set(manifest.tool_versions) == {"python", "torch", "executorch"}


def test_saving_leaves_nothing_else(saved):
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model.json", "model.pte"]


def test_a_failed_save_leaves_nothing(lowered, tmp_path, monkeypatch):
    def fail(self, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(lowered.executorch), "write_to_file", fail)
    with pytest.raises(OSError, match="disk full"):
        lowered.save(tmp_path / "model.pte")
    assert not (tmp_path / "model.pte").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_report_accounts_for_every_node(lowered):
    report = lowered.report
    assert set(report.methods) == {"step", "apply", "loss", "logits"}
    expected = 1 if report.target == "xnnpack" else 0
    for name in ("step", "loss", "logits"):
        method = report.methods[name]
        assert method.partitions == expected, str(report)
        assert method.total_flops > 0
    assert report.methods["apply"].partitions == 0
    assert all(node.reason and node.rule and node.op for _, node in report.nodes)
    assert all(f"{node.op} [{node.rule}]: {node.reason}" in str(report) for _, node in report.nodes)
    assert json.loads(json.dumps(report.to_dict()))["target"] == report.target
    shown = report._repr_html_()
    assert shown.count("nodes not delegated</summary>") == sum(bool(each.portable) for each in report.methods.values())
    assert all(html.escape(reason) in shown for each in report.methods.values() for *_, reason in each.refused)
    assert "self-check" in shown
    if report.target == "xnnpack":
        step = report.methods["step"]
        assert step.delegated_share > 0.9
        embedding = next(node for node in step.portable if node.op == "aten.embedding.default")
        assert "int64" in embedding.reason


@pytest.mark.parametrize("method", ["step", "apply"])
def test_the_graph_tells_the_delegate_of_every_node(lowered, method):
    graph, report = lowered.to_networkx(method), lowered.report.methods[method]
    assert networkx.is_directed_acyclic_graph(graph)
    calls = {name: row for name, row in graph.nodes(data=True) if row["op"] != "placeholder"}
    inside = [row for row in calls.values() if row["delegate"] is not None]
    outside = {name: row for name, row in calls.items() if row["delegate"] is None}
    assert len(inside) == report.delegated_nodes
    assert {row["delegate"] for row in inside} == set(range(report.partitions))
    assert sum(row["flops"] for row in inside) == report.delegated_flops
    assert all(row["reason"] is None for row in inside)
    assert {name: row["reason"] for name, row in outside.items()} == {n.name: n.reason for n in report.portable}
    inputs = [name for name, row in graph.nodes(data=True) if row["op"] == "placeholder"]
    assert len(inputs) == len(lowered.manifest.methods[method].inputs)
    # The data's way leads through delegate calls: every input reaches something that nothing reads.
    ends = {name for name in graph if not graph.out_degree(name)}
    assert all(networkx.descendants(graph, name) & ends for name in inputs)


def test_a_graph_of_no_method_names_the_methods(lowered):
    with pytest.raises(LoweringError, match="no method 'steps'; this program has step, apply"):
        lowered.to_networkx("steps")


def test_weights_are_stored_once(program, saved):
    """Three methods read them. The table is left out: its delegated product has a copy of its own on XNNPACK."""
    data = saved.read_bytes()
    counts = {name: data.count(each.numpy().tobytes()) for name, each in program.weights().items()}
    assert counts.pop("table.weight") in (1, 2)
    assert set(counts.values()) == {1}


def test_the_program_id_is_stable_and_tells_targets_apart(program, lowered):
    again = lowering.lower(program, target="portable")
    same = lowered.manifest.target == "portable"
    assert (again.manifest.program_id == lowered.manifest.program_id) == same


def test_unknown_targets_list_the_known(program):
    with pytest.raises(lowering.UnknownTarget, match="portable, qnn, vulkan, xnnpack"):
        lowering.lower(program, target="tpu")


def test_a_precision_that_the_target_lacks_is_refused(program):
    with pytest.raises(lowering.InvalidOption, match=r"precision='8da4w' .*'xnnpack': expected one of fp32"):
        lowering.lower(program, precision="8da4w")


def test_a_target_whose_needs_are_missing_says_how_to_get_them(program, monkeypatch):
    missing = Availability("xnnpack", False, "the executorch package is not installed", "pip install it")
    monkeypatch.setattr(type(TARGETS["xnnpack"]), "availability", lambda self: missing)
    with pytest.raises(TargetUnavailable, match="pip install it"):
        lowering.lower(program)


def test_available_names_every_target():
    states = lowering.available()
    assert set(states) == {"xnnpack", "portable", "vulkan", "qnn"}
    assert states["xnnpack"].ready
    assert states["portable"].ready


class Lying(Program):
    def __init__(self, change) -> None:
        super().__init__(1)
        self.change = change

    def manifest(self, adapter="external"):
        described = super().manifest(adapter)
        self.change(described["methods"])
        return described


def test_a_manifest_with_a_wrong_shape_is_refused():
    def wrong(methods):
        methods["logits"]["outputs"][0]["shape"] = [1, 2, 3]

    with pytest.raises(MethodMismatch, match=r"logits.*outputs"):
        lowering.lower(Lying(wrong), target="portable")


def test_a_manifest_with_a_missing_output_is_refused():
    def wrong(methods):
        methods["loss"]["outputs"] = []

    with pytest.raises((InvalidProgram, ValueError), match="loss"):
        lowering.lower(Lying(wrong), target="portable")


def test_a_frozen_input_is_refused(program, monkeypatch):
    from lowering import checks

    core = program.core("apply")
    spec = Manifest.model_validate({**program.manifest(), "target": "x", "program_id": "x"}).methods["apply"]
    after = program.export("apply")
    placeholder = next(n for n in after.graph.nodes if n.name == after.graph_signature.user_inputs[0])
    other = next(n for n in after.graph.nodes if n.name == after.graph_signature.user_inputs[1])
    placeholder.replace_all_uses_with(other)
    with pytest.raises(FrozenInput, match=r"blocks\.0\.lora_b"):
        checks.check_inputs_alive("apply", core, after, spec)
