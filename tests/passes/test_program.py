"""The program as a thing to read, export, measure and hand on."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.sites.select import Rejected, Sites
from tests.models import case, llama, llama_inputs

NAMES = ("mlp", "own-loss", "sequence-first", "llama-qv")
METHODS = ("step", "apply", "loss", "logits")


@pytest.mark.parametrize("name", ["mlp", "own-loss"])
def test_two_transforms_give_the_same_text(compiled, name: str) -> None:
    program, _, _ = compiled(name)
    one = case(name)
    again = mz.transform(one.build(), one.inputs(), **one.options)
    assert str(again) == str(program)
    assert [record.after for record in again.history] == [record.after for record in program.history]
    assert again.manifest() == program.manifest()


@pytest.mark.parametrize("name", NAMES)
def test_texts_hold_no_paths(compiled, name: str) -> None:
    program, _, _ = compiled(name)
    for method in program.methods:
        assert not re.search(r"/|\.py|0x", program.text(method))


def test_text_shows_shapes_modules_and_passes(compiled) -> None:
    text = str(compiled("mlp")[0])
    assert "%first_widen: f32[8, 2] = adapter 'first.widen'" in text
    assert re.search(r"%\w+: f32\[24, 8\] = mobizo\.mp_lora\(.*\) +# first \| insert-mp-lora$", text, re.MULTILINE)
    inputs, calls, outputs = text.split("\n\n")
    assert inputs.splitlines()[-1] == "%eps: f32[1] = eps"
    assert all(line.startswith("%") for line in calls.splitlines())
    assert [line.split(" = ")[1] for line in outputs.splitlines()] == [
        "loss", "losses", "projected_gradients", "adapter 'first.widen'", "adapter 'second.widen'",
    ]  # fmt: skip


def test_programs_show_themselves_in_notebooks_and_nothing_of_a_model_is_markup(compiled) -> None:
    program, _, inputs = compiled("mlp")
    shown = program._repr_html_()
    assert html.escape(repr(program)) in shown
    assert shown.count("<details>") == shown.count("</details>") == 3
    assert html.escape(str(program)) in shown
    assert '<td style="text-align:left">first</td>' in program.sites._repr_html_()
    assert len(re.findall("<tr>", program.history._repr_html_())) == len(program.history) + 1
    assert program.history[:2] == tuple(program.history)[:2]
    step = program.step(program.initial_adapter(), inputs, seed=1, lr=0.1, eps=0.01)
    assert "projected gradients" in step._repr_html_()
    frame = program.show(depth=1, height=300)
    cell = frame._repr_html_()
    assert f'srcdoc="{html.escape(frame.page)}" sandbox="allow-scripts"' in cell
    assert '"depth":1,' in frame.page
    with pytest.raises(mz.InputError, match="depth must be a number of levels or None, found 'all'"):
        program.show(depth="all")
    sites = Sites([replace(program.sites[0], name="<b>&")])
    sites.rejected = (Rejected("<i>", "a < b"),)
    assert "&lt;b&gt;&amp;" in sites._repr_html_()
    assert "a &lt; b" in sites._repr_html_()


def test_text_names_nodes_after_their_operators(compiled) -> None:
    text = str(compiled("llama-qv")[0])
    assert not re.search(r"_default\b|%base_model|device=|torch\.", text)
    # Comments stand in one column, or behind a line too long for it: alignment must not ripple through a diff.
    columns = [len(line.split("  # ")[0].rstrip()) for line in text.splitlines() if "  # " in line]
    starts = [line.index("  # ") for line in text.splitlines() if "  # " in line]
    assert starts == [max(width, 88) for width in columns]


def test_a_hoisted_selection_keeps_its_own_origin(compiled) -> None:
    """Labels are gathered where the loss is computed, however far up the selection has moved."""
    graph = compiled("llama-qv")[0].to_networkx()
    picks = [a for _, a in graph.nodes(data=True) if a["op"] == "mobizo.gather_rows"]
    assert picks
    assert {a["origin"] for a in picks} == {"base_model.model"}


def test_history_is_the_pipeline(compiled) -> None:
    program, _, _ = compiled("own-loss")
    assert [record.name for record in program.history] == [
        "canonicalize", "unstack-numbers", "split-complex", "drop-shifts", "fold-constants", "simplify-layouts",
        "canonicalize-products",
        "lift-adapter", "decompose-for-batching", "gather-labels", "hoist-selections", "insert-mp-lora", "regroup-loss",
        "insert-noise",
        "expand-perturbations", "append-update",
    ]  # fmt: skip
    idle = {record.name for record in program.history if not record.rewrites}
    assert idle == {
        "unstack-numbers",
        "split-complex",
        "drop-shifts",
        "canonicalize-products",
        "decompose-for-batching",
    }
    assert program.history[-1].after == str(program)


def test_diff(compiled) -> None:
    program, _, _ = compiled("mlp")
    diff = program.diff("insert-mp-lora")
    assert "+++ after insert-mp-lora" in diff
    assert any(line.startswith("-%") and "aten.linear" in line for line in diff.splitlines())
    assert any(line.startswith("+%") and "mobizo.mp_lora" in line for line in diff.splitlines())


def test_repr(compiled) -> None:
    assert (
        repr(compiled("mlp")[0])
        == "TrainingProgram(Mlp, 2 sites, TwoSided(queries=4), methods=step, apply, loss, logits)"
    )


@pytest.mark.parametrize("name", NAMES)
def test_networkx(compiled, name: str) -> None:
    program, _, _ = compiled(name)
    graph = program.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    wanted = {"op", "shape", "dtype", "type", "origin", "pass", "role", "expanded", "flops", "source"}
    assert all(set(attributes) == wanted for _, attributes in graph.nodes(data=True))
    adapters = {n for n, a in graph.nodes(data=True) if a["role"] == "adapter"}
    assert len(adapters) == len(program.initial_adapter())
    sites = [a for _, a in graph.nodes(data=True) if a["op"] == "mobizo.mp_lora"]
    assert sites
    assert all(a["expanded"] and a["pass"] and a["flops"] > 0 for a in sites)
    # Every adapter reaches the losses, and nothing that is shared lies below a perturbed value.
    losses = program._methods["step"].output_node("losses").name
    assert all(networkx.has_path(graph, adapter, losses) for adapter in adapters)


def _arguments(program: mz.TrainingProgram, method: str, inputs: Any, queries: int = 4) -> tuple[Tensor, ...]:
    from mobizo_passes.capture.inputs import bind_inputs

    values = {
        **program.initial_adapter(), **bind_inputs(program.inputs, inputs),
        "seed": torch.tensor([3]), "lr": torch.tensor([0.01]), "eps": torch.tensor([0.01]),
        "projected_gradients": torch.linspace(-1, 1, queries),
    }  # fmt: skip
    return tuple(values[i["name"]] for i in program.manifest()["methods"][method]["inputs"])


@pytest.mark.parametrize("name", NAMES)
def test_exported_program_is_valid_and_runs(compiled, name: str) -> None:
    program, _, inputs = compiled(name)
    exported = program.exported_program
    exported.validate()
    got = exported.module()(*_arguments(program, "step", inputs))
    want = program.step(program.initial_adapter(), inputs, seed=3, lr=0.01, eps=0.01)
    assert torch.equal(got[1], want.losses)
    assert all(torch.equal(a, b) for a, b in zip(got[3:], want.adapter.values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_core_is_a_valid_program_in_manifest_order(compiled, name: str, method: str) -> None:
    program, _, inputs = compiled(name)
    exported = program.core(method)
    exported.validate()
    assert not [n for n in exported.graph.nodes if "mobizo" in str(n.target)]
    got = exported.module()(*_arguments(program, method, inputs))
    spec = program.manifest()["methods"][method]
    assert [list(t.shape) for t in got] == [o["shape"] for o in spec["outputs"]]
    assert [str(t.dtype).removeprefix("torch.") for t in got] == [o["dtype"] for o in spec["outputs"]]
    adapter = program.initial_adapter()
    if method == "logits":
        torch.testing.assert_close(got[0], program.logits(adapter, inputs))
    elif method == "loss":
        torch.testing.assert_close(got[0], program.loss(adapter, inputs))
    elif method == "apply":
        want = program.apply(adapter, seed=3, lr=0.01, projected_gradients=torch.linspace(-1, 1, 4))
        assert all(torch.equal(a, b) for a, b in zip(got, want.values(), strict=True))


def test_methods_share_weights(compiled) -> None:
    """One tensor object per FQN in all methods: lowering stores each weight once."""
    program, _, _ = compiled("own-loss")
    states = [program.core(method).state_dict for method in ("step", "loss", "logits")]
    shared = set(states[0]) & set(states[1]) & set(states[2])
    assert any("norms" in fqn for fqn in shared)
    assert all(states[0][fqn] is states[1][fqn] is states[2][fqn] for fqn in shared)


def test_manifest_is_json_and_complete(compiled) -> None:
    program, _, _ = compiled("llama-qv")
    manifest = json.loads(json.dumps(program.manifest()))
    assert manifest == program.manifest()
    assert [i["role"] for i in manifest["methods"]["step"]["inputs"]] == ["adapter"] * 4 + ["batch"] * 3 + [
        "seed", "lr", "eps",
    ]  # fmt: skip
    assert [o["role"] for o in manifest["methods"]["step"]["outputs"]] == [
        "loss", "losses", "projected_gradients", *["adapter"] * 4,
    ]  # fmt: skip
    assert [i["role"] for i in manifest["methods"]["apply"]["inputs"]] == ["adapter"] * 4 + [
        "seed", "lr", "projected_gradients",
    ]  # fmt: skip
    assert manifest["batch"] == {
        "size": 3, "inputs": ["input_ids", "attention_mask", "labels"], "label_inputs": ["labels"],
        "max_labels": 2, "ignore_index": -100, "shift": True,
        "dims": {"input_ids": 0, "attention_mask": 0, "labels": 0}, "logits_dim": 0, "class_inputs": ["labels"],
    }  # fmt: skip
    assert [a["trainable"] for a in manifest["adapter"]] == [True] * 4 + [False] * 4


def test_the_models_hash_changes_with_any_weight_only(compiled) -> None:
    one = case("mlp")
    first = compiled("mlp")[0].manifest()["model"]
    model = one.build()
    assert mz.transform(model, one.inputs(), **one.options).manifest()["model"] == first
    with torch.no_grad():
        model.get_parameter("head.bias")[0] += 1
    assert mz.transform(model, one.inputs(), **one.options).manifest()["model"] != first


def test_transform_leaves_the_model_as_it_was() -> None:
    model: Any = llama()
    model.train()
    model.eval()
    before = {k: (v.clone(), v.requires_grad) for k, v in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    cache = model.config.use_cache
    inputs = llama_inputs()
    copies = {k: v.clone() for k, v in inputs.items()}
    program = mz.transform(model, inputs, estimator=mz.TwoSided(1))
    adapter = program.initial_adapter()
    program.step(adapter, inputs, seed=0, lr=1.0, eps=0.1)
    assert {k: v.requires_grad for k, v in model.named_parameters()} == {k: flag for k, (_, flag) in before.items()}
    assert any(flag for _, flag in before.values())
    assert all(torch.equal(v, before[k][0]) for k, v in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache == cache
    assert all(torch.equal(inputs[k], v) for k, v in copies.items())
    # Copies are copies: neither training nor a caller's edits reach the program.
    assert all(torch.equal(v, adapter[k]) for k, v in program.initial_adapter().items())
    next(iter(adapter.values())).zero_()
    assert not torch.equal(next(iter(adapter.values())), next(iter(program.initial_adapter().values())))
    program.frozen_adapter()[program.sites[0].lora_A].zero_()
    assert program.frozen_adapter()[program.sites[0].lora_A].abs().sum() > 0


def test_flags_are_restored_when_the_export_fails() -> None:
    model: Any = llama()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(mz.CaptureError):
        mz.transform(model, {"input_ids": torch.ones(2, 3)})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert any(flags)


def test_late_expansion_computes_the_lower_layers_once() -> None:
    """With LoRA on the upper of two blocks only, the lower one stays on the plain batch."""
    one = case("block-tokens")
    model, inputs = one.build(), one.inputs()
    everything = mz.transform(model, inputs, **one.options)
    upper = mz.transform(model, inputs, **one.options, sites=lambda s: ".1" in s.lora_B)
    assert everything.flops.share_computed_once < 0.35 < upper.flops.share_computed_once < 1
    assert upper.flops.total < everything.flops.total
    assert upper.flops.total == upper.flops.shared + upper.flops.expanded
    mz.verify(upper, model, inputs)
    expanded = [n for n in upper._methods["step"].graph.nodes if facts(n).expanded]
    assert not any(
        (n.meta.get("nn_module_stack") or {}) and "attention.0" in str(n.meta["nn_module_stack"]) for n in expanded
    )


def test_flops_by_hand(compiled) -> None:
    """mlp, batch 3, 8 groups; 2 FLOPs per multiply-add."""
    flops = compiled("mlp")[0].flops
    shared = 2 * 3 * (6 * 8 + 6 * 2)  # first layer's base and lora_A
    expanded = 2 * 24 * (2 * 8 + 8 * 7 + 8 * 1 + 1 * 7 + 7 * 4)
    assert (flops.shared, flops.expanded, flops.groups) == (shared, expanded, 8)


def test_flops_of_a_convolution_per_group_by_hand() -> None:
    """1x2 kernel, 3 -> 4 channels in 1 channel group, 5 positions, 2 examples x 6 groups."""
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_function(torch.ops.mobizo.mp_conv.default, (x, w, [1], [0], [1], 1))
    x.meta["val"], w.meta["val"] = torch.empty(12, 3, 6), torch.empty(6, 4, 3, 2)
    y.meta["val"] = torch.ops.mobizo.mp_conv(x.meta["val"], w.meta["val"], [1], [0], [1], 1)
    assert y.meta["val"].shape == (12, 4, 5)
    assert node_flops(y) == 2 * 12 * 4 * 5 * (3 * 2)


@pytest.mark.parametrize("library", ["transformers", "peft", "executorch", "pydantic", "safetensors", "hypothesis"])
def test_the_compiler_imports_torch_and_networkx_only(library: str) -> None:
    code = f"import sys, mobizo_passes; sys.exit({library!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_lowers_the_loss(compiled) -> None:
    """Fifty steps on one batch: the estimator points downhill."""
    program, _, inputs = compiled("own-loss")
    adapter = program.initial_adapter()
    before = float(program.loss(adapter, inputs))
    for seed in range(50):
        adapter = program.step(adapter, inputs, seed=seed, lr=2e-2, eps=1e-2).adapter
    assert float(program.loss(adapter, inputs)) < 0.8 * before
