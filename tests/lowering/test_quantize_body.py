"""Quantization of what a delegate computes, and the batches that it is measured on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
import mobizo_passes as mz
from lowering import calibration as ranges
from lowering.calibration import SPREAD, Calibration, digest_of
from lowering.passes.values.quantize_body import QuantizeBody
from lowering.stages import legalize
from lowering.targets import get_target
from lowering.targets.qnn.partitioner import body_of
from runtime_driver.format import Manifest
from tests.lowering.passkit import Fn, rewrite
from tests.models import Mlp, cross_entropy, integers, random, seeded

X = random(6, 5)
WEIGHTS = {"w": random(7, 5), "v": random(3, 7), "b": random(3)}
"""Not square, so that a scale along the wrong axis does not fit."""


def body(calls: list[Any]) -> list[Any]:
    return list(body_of(calls)[0])


def quantizer() -> Any:
    """XNNPACK's, which needs no vendor's libraries: 8 bits for activations and, by channel, for weights."""
    module = pytest.importorskip("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = module.get_symmetric_quantization_config(is_per_channel=True)
    return module.XNNPACKQuantizer().set_global(config)


def pass_over(values: list[list[Tensor]]) -> QuantizeBody:
    return QuantizeBody(body, lambda nodes: values, quantizer)


def mlp(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, m.w)), m.v, m.b).sum(1) * 3.0


def test_weights_become_integers_and_what_follows_the_products_stays_as_it_is():
    result = rewrite(Fn(mlp, **WEIGHTS), (X,), pass_over([[X]]))
    ops = Counter(str(n.target).split(".")[1] for n in result.after.graph.nodes if n.op == "call_function")
    assert ops["dequantize_per_channel"] == 2
    assert ops["quantize_per_tensor"] >= 3
    stored = {tuple(value.shape): value.dtype for value in result.after.state_dict.values() if value.dim() == 2}
    assert stored == {(7, 5): torch.int8, (3, 7): torch.int8}
    *_, total, scaled = [n for n in result.after.graph.nodes if n.op == "call_function"]
    assert [str(total.target), str(scaled.target)] == ["aten.sum.dim_IntList", "aten.mul.Tensor"]
    # 8 bits: half a step of 1/127 of the range for each of five roundings, not all in one direction.
    assert 1e-4 < result.error < 2.5 / 127


def test_each_node_says_where_the_float_one_came_from():
    result = rewrite(Fn(mlp, **WEIGHTS), (X,), pass_over([[X]]))
    linears = [n for n in result.after.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(linears) == 2
    assert all("in forward" in n.meta["stack_trace"] for n in linears)


def test_what_reads_two_results_comes_after_both():
    def both(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first = F.linear(x, m.w)
        early = first.long()
        return early, F.linear(torch.relu(first), m.v)

    result = rewrite(Fn(both, **WEIGHTS), (X,), pass_over([[X]]))
    assert result.rewrites["quantize-body"] == 3


@pytest.mark.parametrize("method", [lambda m, x: x * m.w[0], lambda m, x: x.long() @ m.w.T.long()])
def test_a_method_without_a_floating_point_product_is_left_alone(method: Any):
    assert rewrite(Fn(method, **WEIGHTS), (X,), pass_over([])).rewrites["quantize-body"] == 0


@pytest.fixture(scope="module")
def program() -> mz.TrainingProgram:
    return mz.transform(seeded(Mlp()), BATCH, estimator=mz.TwoSided(queries=1), loss=cross_entropy)


BATCH = (random(3, 6), integers(4, 3))


def calibration(program: mz.TrainingProgram, *batches: Any) -> Calibration:
    manifest = Manifest.model_validate({**program.manifest(), "target": "qnn", "program_id": "test"})
    return Calibration.of(manifest, batches, {**program.initial_adapter(), **program.frozen_adapter()})


def test_each_batch_runs_with_the_initial_adapter_and_with_one_that_has_moved(program: mz.TrainingProgram):
    runs = calibration(program, BATCH, (BATCH[0] * 2, BATCH[1]))
    core = program.core("step")
    wanted = [node for node in core.graph.nodes if node.op == "placeholder"]
    names = [node.name for node in wanted]
    found = [dict(zip(names, values, strict=True)) for values in runs.values("step", core, wanted)]
    again = [dict(zip(names, values, strict=True)) for values in runs.values("step", core, wanted)]
    assert len(found) == 4
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, again, strict=True) for name in names)
    inputs = [spec.name for spec in runs.manifest.methods["step"].inputs]
    places = dict(zip(inputs, core.graph_signature.user_inputs, strict=True))
    for fqn, initial in program.initial_adapter().items():
        place = str(places[fqn])
        assert torch.equal(found[0][place], initial)
        moved = found[1][place] - initial
        assert 0.4 * SPREAD < float(moved.std()) < 1.6 * SPREAD
    x = str(places[runs.manifest.batch.inputs[0]])
    assert torch.equal(found[2][x], 2 * found[1][x])


def test_directions_are_drawn_several_times_and_are_longer(monkeypatch: pytest.MonkeyPatch):
    derived = mz.transform(seeded(Mlp()), BATCH, estimator=mz.ForwardGradient(queries=1), loss=cross_entropy)
    runs, core = calibration(derived, BATCH), derived.core("step")
    names = ranges.directions([spec.role for spec in runs.manifest.methods["step"].inputs], core)
    place = list(core.graph_signature.user_inputs)[len(derived.initial_adapter())]
    *_, z = (node for node in core.graph.nodes if node.name in names)
    x = next(node for node in core.graph.nodes if node.name == place)
    found = list(runs.values("step", core, [z, x]))
    monkeypatch.setattr(ranges, "MARGIN", 1.0)
    plain = list(runs.values("step", core, [z, x]))
    assert len(found) == 2 * ranges.SEEDS
    assert not torch.equal(plain[0][0], plain[1][0])
    for (long, batch), (short, same) in zip(found, plain, strict=True):
        assert torch.equal(long, 2.0 * short)
        assert torch.equal(batch, same)


def test_the_step_holds_its_adapter_where_it_is_internal(program: mz.TrainingProgram):
    core = program.core("step", "internal")
    written = core.graph_signature.buffers_to_mutate.values()
    nodes = [n for n in core.graph.nodes if core.graph_signature.inputs_to_buffers.get(n.name) in written]
    manifest = Manifest.model_validate({**program.manifest("internal"), "target": "qnn", "program_id": "test"})
    runs = Calibration.of(manifest, (BATCH,), program.frozen_adapter())
    initial, moved = runs.values("step", core, nodes)
    assert nodes
    for node, first, second in zip(nodes, initial, moved, strict=True):
        fqn = core.graph_signature.inputs_to_buffers[node.name]
        assert torch.equal(first, core.state_dict[fqn])
        assert not torch.equal(first, second)


def test_noise_and_update_keep_their_bits(program: mz.TrainingProgram, monkeypatch: pytest.MonkeyPatch):
    """Only what lies between the products is rounded: same noise, and the update that follows from the gradients."""
    target = get_target("qnn").configured({"precision": "8a8w"})
    monkeypatch.setattr(type(target), "_quantizer", lambda self: quantizer())
    runs = calibration(program, BATCH)
    legal = legalize("step", program.core("step"), target, runs)
    assert [record.rewrites > 0 for record in legal.passes if record.name == "quantize-body"] == [True]
    scalars = {"seed": torch.tensor([3]), "lr": torch.tensor([0.5]), "eps": torch.tensor([0.01])}
    adapter = {**program.initial_adapter(), **program.frozen_adapter()}
    given = {**adapter, **dict(zip(runs.manifest.batch.inputs, BATCH, strict=True)), **scalars}
    spec = runs.manifest.methods["step"]
    outputs = legal.program.module()(*(given[each.name] for each in spec.inputs))
    found = dict(zip((each.name for each in spec.outputs), outputs, strict=True))
    exact = program.step(program.initial_adapter(), BATCH, seed=3, lr=0.5, eps=0.01)
    difference = float((found["losses"] - exact.losses).abs().max())
    assert 0 < difference < 0.1 * float(exact.losses.abs().max())
    again = program.apply(program.initial_adapter(), seed=3, lr=0.5, projected_gradients=found["projected_gradients"])
    for fqn, value in again.items():
        torch.testing.assert_close(found[fqn], value, rtol=1e-6, atol=1e-7)


def test_other_batches_have_another_digest():
    first, second = BATCH
    assert digest_of([BATCH]) == digest_of([(first.clone(), second.clone())])
    others = ([(first + 1, second)], [(first.T, second)], [(first, second.int())], [BATCH, BATCH])
    assert len({digest_of([BATCH]), *map(digest_of, others)}) == 5


@pytest.mark.parametrize(
    ("batches", "problem"),
    [
        ([], "no batch"),
        ([BATCH[0]], "batch 0 should be a tuple or mapping of"),
        ([BATCH, (BATCH[0],)], "batch 1 should be a tuple or mapping of"),
        ([{"x": BATCH[0]}], "batch 0 has x; expected"),
        ([(BATCH[0][:2], BATCH[1])], r"batch 0: expected float32\[3, 6\], found float32\[2, 6\]"),
        ([(BATCH[0].double(), BATCH[1])], r"expected float32\[3, 6\], found float64\[3, 6\]"),
        ([(BATCH[0], 3)], "found 3"),
    ],
)
def test_batches_that_do_not_fit_are_named(program: mz.TrainingProgram, batches: list[Any], problem: str):
    with pytest.raises(lowering.InvalidCalibration, match=problem):
        calibration(program, *batches)


def test_batches_are_asked_for_where_ranges_are_needed_and_refused_elsewhere(
    program: mz.TrainingProgram, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(type(get_target("qnn")), "require", lambda self: None)
    with pytest.raises(lowering.InvalidCalibration, match=r"precision='16a8w'.*pass calibration=\[batch"):
        lowering.lower(program, target="qnn", precision="16a8w")
    with pytest.raises(lowering.InvalidCalibration, match=r"'qnn' with precision='fp16', soc='SM8650'.*leave it out"):
        lowering.lower(program, target="qnn", calibration=[BATCH])
    with pytest.raises(
        lowering.InvalidCalibration, match="'xnnpack' with precision='fp32', weights='packed' does not quantize"
    ):
        lowering.lower(program, target="xnnpack", calibration=[BATCH])
