"""Steps that differentiate, on delegates: one partition with primal, derivatives and optimizer, weights in it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lowering
import mobizo_passes as mz
from lowering.passes.layers.convert_weights_to_linears import ConvertWeightsToLinears
from lowering.targets.partitions import one_body, trailing_nodes
from tests.lowering.passkit import Fn, rewrite
from tests.lowering.small import only
from tests.models import Mlp, integers, random, seeded

LENGTH = 16


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two layers with shared heads and a tied head, sizes that are no multiples of one another by accident."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    model = seeded(peft.get_peft_model(transformers.LlamaForCausalLM(config), lora), scale=0.2)
    tokens = integers(96, 2, LENGTH)
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def test_a_llama_is_one_partition_with_its_optimizer(tmp_path: Path) -> None:
    model, inputs = llama()
    program = mz.transform(model, inputs, estimator=mz.Exact(), optimizer=mz.AdamW(), trainable="lora_A+lora_B")
    lowered = lowering.lower(program, target="xnnpack", check=True)
    step = lowered.report.methods["step"]
    assert step.partitions == 1
    assert step.delegated_share >= 0.99
    # Matrices that a product and its gradient read: not turned, so not stored twice.
    passes = {record.name: record.rewrites for record in step.passes}
    assert passes["convert-weights-to-linears"] > 0
    assert lowered.report.self_check.compared


def test_checkpoints_hold_less_and_give_the_same_step() -> None:
    model, inputs = llama()
    plain, checkpointed = (
        mz.transform(model, inputs, estimator=mz.Exact(checkpoint=each), optimizer=mz.AdamW())
        for each in (None, "layer")
    )
    lowered = [lowering.lower(only(each, "step"), check=True) for each in (plain, checkpointed)]
    reports = [each.report for each in lowered]
    assert [each.manifest.options["weights"] for each in lowered] == ["balanced", "mapped"]
    # The bits are those of the same operators on the same values: only their order in time differs.
    adapter = plain.initial_adapter()
    found, expected = (each.gradients(adapter, inputs) for each in (checkpointed, plain))
    assert all(torch.equal(found[fqn], expected[fqn]) for fqn in adapter)
    saved = [each.methods["step"].memory.saved for each in reports]
    assert [each.methods["step"].partitions for each in reports] == [1, 1]
    # One of two layers is held in either case.
    assert 0 < saved[1] < 0.7 * saved[0]


def test_a_llama_s_tangents_are_one_partition() -> None:
    model, inputs = llama()
    program = mz.transform(model, inputs, estimator=mz.ForwardGradient(queries=3), trainable="lora_A+lora_B")
    lowered = lowering.lower(program, target="xnnpack", check=True)
    step = lowered.report.methods["step"]
    assert step.partitions == 1
    assert step.delegated_share >= 0.99
    # Each weight is read for the loss and for its derivative: most of them from the file, not from two copies.
    assert lowered.manifest.options == {"weights": "balanced"}
    assert step.memory.held > 0
    compared = {(each.method, each.output): each for each in lowered.report.self_check.compared}
    assert compared["step", "projected_gradients"].deviation > 0


# Bytes that the delegate of `loss` copies: of all matrices and biases; of the largest matrix that fits into a third of
# them, 8 x 6 floats, and its bias; none.
@pytest.mark.parametrize(
    ("options", "recorded", "held"),
    [
        ({"target": "portable"}, None, 0),
        ({"weights": "packed"}, None, (8 * 6 + 8 + 2 * 6 + 7 * 8 + 7 + 1 * 8 + 4 * 7 + 4) * 4),
        ({}, "balanced", (8 * 6 + 8) * 4),
        ({"weights": "mapped"}, "mapped", 0),
    ],
)
def test_gradients_are_a_method_that_runs(options: Any, recorded: str | None, held: int) -> None:
    model, inputs = seeded(Mlp()), (random(3, 6), integers(4, 3))
    program = mz.transform(model, inputs, estimator=mz.Exact(gradients=True), loss=F.cross_entropy)
    lowered = lowering.lower(program, check=True, **options)
    assert {each.method for each in lowered.report.self_check.compared} >= {"step", "gradients"}
    assert lowered.manifest.options.get("weights") == recorded
    assert lowered.report.methods["loss"].memory.held == held


class Convolved(nn.Module):
    """A convolution with a bias below the adapter; float32[B, 2, 9] to float32[B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest = nn.Conv1d(2, 6, 3), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x).mean(-1))


@pytest.mark.parametrize("weights", ["balanced", "mapped"])
def test_a_convolution_keeps_its_bias_where_weights_are_read_in_place(weights: str) -> None:
    inputs = (random(3, 2, 9), integers(4, 3))
    program = mz.transform(seeded(Convolved()), inputs, estimator=mz.Exact(), loss=F.cross_entropy)
    # Checked in the runtime, which refuses to load a convolution without a constant bias.
    lowered = lowering.lower(only(program, "step"), check=True, weights=weights)
    assert lowered.report.self_check.compared


def test_an_adapter_inside_and_halves_are_refused() -> None:
    program = mz.transform(seeded(Mlp()), (random(3, 6), integers(4, 3)), estimator=mz.Exact(), loss=F.cross_entropy)
    with pytest.raises(mz.InputError, match="lower with adapter='external'"):
        lowering.lower(program, target="portable", adapter="internal")
    with pytest.raises(lowering.InvalidOption, match=r"precision='fp16' .*'xnnpack with exact gradients'"):
        lowering.lower(program, target="xnnpack", precision="fp16")


def test_a_matrix_of_a_linear_and_its_gradient_is_not_turned() -> None:
    def both(module: Any, x: Tensor) -> Tensor:
        y = F.linear(x, module.w)
        return torch.matmul(y * y, module.w)

    result = rewrite(Fn(both, w=random(7, 5)), (random(2, 3, 5),), ConvertWeightsToLinears(keep_shared=True))
    assert result.rewrites == {"convert-weights-to-linears": 1}
    assert (result.ops()["mm"], result.ops()["linear"], result.ops()["permute"]) == (1, 1, 0)
    turned = rewrite(Fn(both, w=random(7, 5)), (random(2, 3, 5),), ConvertWeightsToLinears())
    assert (turned.ops()["linear"], turned.ops()["permute"]) == (2, 1)


def graph(fn: Callable[..., Any], *args: Tensor) -> dict[str, fx.Node]:
    nodes = torch.export.export(Fn(fn), args).graph.nodes
    return {node.name: node for node in nodes}


X = random(4, 4)


def test_what_trails_the_loss_is_not_in_the_body() -> None:
    def step(_: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.mm(x, x)
        loss = torch.log_softmax(y, 1) * 2.0
        return loss, torch.mm(y * 3.0, x)

    nodes = graph(step, X)
    outside = {node for name, node in nodes.items() if "log_softmax" in name}
    supported = {node for node in nodes.values() if node.op == "call_function"} - outside
    assert {node.name for node in trailing_nodes(nodes["mm"].graph, supported)} == {"mul"}
    body = one_body(nodes["mm"].graph, supported - {nodes["mul"]})
    assert body is not None
    assert {node.name for node in body} == {"mm", "mul_1", "mm_1"}


def test_a_body_that_something_outside_leads_back_into_is_none() -> None:
    def step(_: Any, x: Tensor) -> Tensor:
        y = torch.mm(x, x)
        return torch.mm(torch.log_softmax(y, 1) + y, x)

    nodes = graph(step, X)
    outside = {node for name, node in nodes.items() if "log_softmax" in name}
    supported = {node for node in nodes.values() if node.op == "call_function"} - outside
    assert one_body(nodes["mm"].graph, supported) is None


def test_products_that_fall_apart_are_no_body() -> None:
    nodes = graph(lambda _, x: (torch.mm(x, x), torch.mm(x * 2.0, x)), X)
    supported = {node for node in nodes.values() if node.op == "call_function"}
    assert one_body(nodes["mm"].graph, supported) is None
