"""Programs for Vulkan: what is delegated, and whether the delegated graph computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
from lowering.simulate import Simulation, nearest, simulate, truncated
from lowering.targets.vulkan.rules import RULES
from runtime_driver.format.footer import FOOTER_BYTES
from tests.coverage.hf_rows import ENCODER, IMAGES, LLAMA, build, classified, pictured
from tests.coverage.peft_rows import QV
from tests.lowering.small import Program, only
from tests.models import llama, llama_inputs
from tests.passes.contract import Tiny, rows

GPT2 = {"vocab_size": 19, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 16}
FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Llama": (lambda: build("Llama", QV, {**LLAMA, "num_hidden_layers": 1}), llama_inputs),
    "GPT-2": (lambda: build("GPT2", ["c_attn"], GPT2, "LMHeadModel", fan_in_fan_out=True), llama_inputs),
    "BERT": (
        lambda: build("Bert", ["query"], {**ENCODER, "num_hidden_layers": 1}, "ForSequenceClassification"),
        classified,
    ),
    "ViT": (
        lambda: build("ViT", ["q_proj", "query"], {**IMAGES, "num_hidden_layers": 1}, "ForImageClassification"),
        pictured(),
    ),
}


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(1)


@pytest.fixture(scope="module")
def simulated(program) -> Callable[[str], Simulation]:
    made: dict[str, Simulation] = {}

    def get(precision: str) -> Simulation:
        if precision not in made:
            made[precision] = simulate(program, "vulkan", precision=precision)
        return made[precision]

    return get


def test_the_delegated_graph_computes_the_step(program, simulated):
    for found, expected in zip(simulated("fp32").run(program.inputs("step")), program.expected("step"), strict=True):
        # A projected gradient is a difference of losses over 2 eps.
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    found, expected = simulated("fp32").run(program.inputs("step"))[1], program.expected("step")[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_an_exact_step_keeps_every_rule_and_is_the_same():
    program, batch = mz.transform(llama(), llama_inputs(), estimator=mz.Exact()), llama_inputs()
    step = only(program, "step")
    report = lowering.lower(step, target="vulkan").report.methods["step"]
    assert (report.partitions, report.delegated_share) == (1, 1.0)
    inputs = {**program.initial_adapter(), **batch, "lr": torch.tensor([1.0])}
    for found, expected in zip(simulate(step, "vulkan").run(inputs), program.run("step", inputs).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_in_half_precision_the_loss_itself_stays_outside(program, simulated):
    half = simulated("fp16")
    outside = {node.op: node.reason for node in half.report.portable}
    assert "float16 delegate" in outside["aten._log_softmax.default"]
    assert "aten._log_softmax.default" not in {node.op for node in simulated("fp32").report.portable}
    losses, expected = half.run(program.inputs("step"))[1], program.expected("step")[1]
    torch.testing.assert_close(losses, expected, rtol=2e-3, atol=0)
    assert not torch.equal(losses, simulated("fp32").run(program.inputs("step"))[1])


@pytest.mark.parametrize("truncate", [False, True])
def test_in_half_precision_step_and_apply_agree_to_the_bit(program, simulated, truncate):
    """Noise that a delegate hands back is rounded; replay, which has no delegate, would end elsewhere."""
    inputs = program.inputs("step")
    out = simulated("fp16").run(inputs, truncate=truncate)
    given = {**program.adapter, "seed": inputs["seed"], "lr": inputs["lr"], "projected_gradients": out[2]}
    for new, again in zip(out[3:], program.run("apply", given).values(), strict=True):
        assert torch.equal(new, again)
    made = [
        node for node in simulated("fp16").report.portable if node.reason.startswith("no matrix product leads to it")
    ]
    assert made, "the perturbed copies are formed in float32"


def test_halves_are_rounded_or_cut():
    values = torch.tensor([1.0, 1.0 + 2**-11 + 2**-12, -1.0 - 2**-11 - 2**-12, 0.1, -0.1, 0.0, 65504.0])
    cut = truncated(values)
    assert (cut.abs() <= values.abs()).all()
    assert nearest(values)[1] == 1.0 + 2**-10
    assert cut[1] == 1.0
    assert torch.equal(cut, cut.half().float())
    assert ((values - cut).abs() <= 2**-10 * values.abs()).all()


def test_every_node_left_outside_has_a_reason(simulated):
    report = simulated("fp32").report
    assert report.partitions == 1
    assert report.delegated_share == 1.0
    reasons = {node.op: node.reason for node in report.portable}
    assert "image limits" in reasons["aten.embedding.default"]
    assert all("no delegate" not in reason for reason in reasons.values())


def test_rules_are_called_as_the_checker_calls_them(simulated):
    ours = {"constraints", "one-partition", "matrix-product", "tied-table", "float32-loss", "float32-noise"}
    for precision in ("fp32", "fp16"):
        found = {node.op: node.rule for node in simulated(precision).report.portable}
        assert set(found.values()) <= ours | {rule.name for rule in RULES}
        assert found["aten.embedding.default"] == "no-embedding"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_step_is_one_partition_with_its_products(name):
    model, inputs = FAMILIES[name]
    made = mz.transform(model(), inputs(), estimator=mz.OneSided(queries=1), noise="rademacher")
    report = simulate(made, "vulkan").report
    assert report.partitions == 1, report
    assert report.delegated_share >= 0.99, report


# The error function is in the derivative of BERT's GELU.
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_directional_derivatives_in_half_precision(name):
    """No ε divides the rounding: two-sided differences of these models are off by 0.04 and 0.2."""
    model, inputs = (make() for make in FAMILIES[name])
    program = mz.transform(model, inputs, estimator=mz.ForwardGradient(2))
    simulation = simulate(program, "vulkan", precision="fp16")
    assert simulation.report.partitions == 1, simulation.report
    assert simulation.report.delegated_share >= 0.99, simulation.report
    scalars = {"seed": torch.tensor([3]), "lr": torch.tensor([0.05])}
    given = {**program.initial_adapter(), **program.example_batch(), **scalars}
    want = program.run("step", given)["projected_gradients"]
    found = simulation.run(given)[2]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-2 * float(want.abs().max()))


def test_importing_executorch_s_stage_leaves_the_log_as_it_was(program):
    before = logging.getLogger().level
    lowering.lower(program, target="vulkan")
    assert logging.getLogger().level == before


def test_the_runtime_s_fusions_are_given_back(simulated):
    from executorch.backends.vulkan.patterns import fusable_patterns

    simulated("fp32")
    assert {"rms_norm", "hf_rope"} <= set(fusable_patterns)


def test_a_lowered_program_says_what_it_is(program, tmp_path):
    lowered = lowering.lower(program, target="vulkan", precision="fp16")
    assert lowered.manifest.target == "vulkan"
    assert lowered.manifest.options == {"precision": "fp16"}
    assert lowered.save(tmp_path / "model.pte").stat().st_size == lowered.report.program_bytes + FOOTER_BYTES


def test_a_broken_rule_withholds_the_program(program, monkeypatch):
    from lowering.targets.vulkan import partitioner

    # As if the partitioner trusted ExecuTorch's own judgement.
    monkeypatch.setattr(partitioner, "why_not", lambda node: None)
    with pytest.raises(lowering.RuleBroken, match=r"method 'step': executorch_call_delegate\w*, operator \d+ "):
        lowering.lower(program, target="vulkan")


def test_an_adapter_inside_the_program_stays_outside_the_delegate():
    tiny = mz.transform(Tiny(), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1), noise="rademacher")
    lowered = lowering.lower(tiny, target="vulkan", adapter="internal")
    assert lowered.manifest.adapter_state == "internal"
    assert lowered.report.methods["step"].partitions == 1
    assert lowered.report.methods["step"].delegated_share == 1.0
