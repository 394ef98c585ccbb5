"""The QNN target: compiled for Snapdragon chips, run on the HTP simulator, compared with eager float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
import runtime_driver
from lowering.calibration import digest_of
from lowering.lowered import Lowered
from lowering.stages import legalize, measured_on
from lowering.targets import get_target
from runtime_driver.backends import qnn as qnn_host
from runtime_driver.format import Manifest
from tests.lowering.small import only
from tests.models import Lora, cross_entropy, integers, llama, llama_inputs, random, seeded

try:
    qnn_host.find()
    MISSING = ""
except qnn_host.HostLibrariesMissing as error:
    MISSING = str(error)

on_simulator = pytest.mark.skipif(bool(MISSING), reason=MISSING)
SCALARS = {"seed": 3, "lr": 0.05, "eps": 1e-2}
LOSS_ERROR = 5e-3


class WideMlp(nn.Module):
    """LoRA around a LayerNorm, and more classes than ExecuTorch's own softmax should have to do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = Lora(16, 24), nn.LayerNorm(24), Lora(24, 1100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.gelu(self.norm(self.first(x)))) * 0.2


MLP_INPUTS = (random(3, 16), integers(1100, 3))


@pytest.fixture(scope="module")
def mlp() -> mz.TrainingProgram:
    model = seeded(WideMlp())
    return mz.transform(model, MLP_INPUTS, estimator=mz.TwoSided(queries=2), loss=cross_entropy)


@pytest.fixture(scope="module")
def llm() -> mz.TrainingProgram:
    return mz.transform(llama(), llama_inputs(), estimator=mz.TwoSided(queries=2))


def saved(lowered: Lowered, folder: Path) -> runtime_driver.Session:
    return runtime_driver.Session(lowered.save(folder / "model.pte"))


def assert_one_binary(lowered: Lowered, *methods: str) -> None:
    for name in methods:
        report = lowered.report.methods[name]
        assert report.partitions == 1, str(report)
        assert report.delegated_share == 1.0
    plans = {plan.name: plan for plan in lowered.executorch.executorch_program.execution_plan}
    assert [each.id for name in methods for each in plans[name].delegates] == ["QnnBackend"] * len(methods)
    assert all(node.reason and node.reason != "the portable target has no delegate" for _, node in lowered.report.nodes)


@on_simulator
def test_a_lora_mlp_agrees_with_eager(mlp: mz.TrainingProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lowered = lowering.lower(mlp, target="qnn", soc="SM8650")
    assert_one_binary(lowered, "step", "loss", "logits")
    assert lowered.manifest.options == {"soc": "SM8650", "precision": "fp16", "weights": "separate"}
    inside = {row["op"] for _, row in lowered.to_networkx().nodes(data=True) if row["delegate"] is not None}
    assert {"aten._log_softmax.default", "aten.native_layer_norm.default", "aten.bmm.default"} <= inside
    session = saved(lowered, tmp_path)
    batch = dict(zip(session.manifest.batch.inputs, MLP_INPUTS, strict=True))
    expected = mlp.step(mlp.initial_adapter(), MLP_INPUTS, **SCALARS)
    found = session.step(batch, **SCALARS, update=False)
    assert found.losses == pytest.approx(expected.losses.tolist(), abs=LOSS_ERROR)
    loss = session.evaluate([batch]).loss
    assert loss == pytest.approx(float(mlp.loss(mlp.initial_adapter(), MLP_INPUTS)), abs=LOSS_ERROR)
    eager = mlp.logits(mlp.initial_adapter(), MLP_INPUTS)
    assert float((session.predict(batch) - eager).abs().max()) < 4e-3 * float(eager.abs().max())
    assert_missing_simulator_is_said(session.program, monkeypatch)


def assert_missing_simulator_is_said(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has not loaded the libraries, a method with a binary in it cannot be loaded."""

    class Unloadable:
        def load_method(self, name: str) -> None:
            raise RuntimeError("0x1")

    def missing() -> None:
        raise qnn_host.HostLibrariesMissing

    program.release("step")
    monkeypatch.setattr(program, "_open", lambda with_weights: Unloadable())
    monkeypatch.setattr(qnn_host, "enable", missing)
    with pytest.raises(runtime_driver.ProgramFileError, match=r"`step`.*simulator.*libQnnHtp\.so.*pip install"):
        program.execute("step", [])


@on_simulator
def test_an_exact_step_of_a_language_model_is_one_binary(tmp_path: Path):
    program, batch = mz.transform(llama(), llama_inputs(), estimator=mz.Exact()), llama_inputs()
    lowered = lowering.lower(only(program, "step"), target="qnn")
    assert_one_binary(lowered, "step")
    adapter = program.initial_adapter()
    found = saved(lowered, tmp_path).step(batch, lr=1.0, update=False)
    expected = program.step(adapter, batch, lr=1.0)
    assert found.loss == pytest.approx(float(expected.loss), abs=LOSS_ERROR)
    for fqn, start in adapter.items():
        # With plain SGD the update is the gradient. Halves round to 5e-4, once at each of some 100 values on the way.
        exact = start - expected.adapter[fqn]
        assert float((found.adapter[fqn] - expected.adapter[fqn]).norm() / exact.norm()) < 1e-2


@on_simulator
@pytest.mark.parametrize("soc", ["SM8650", "SM8750"])
def test_a_language_model_agrees_with_eager_and_learns(llm: mz.TrainingProgram, soc: str, tmp_path: Path):
    lowered = lowering.lower(only(llm, "step", "apply"), target="qnn", soc=soc)
    assert_one_binary(lowered, "step")
    outside = {node.op for node in lowered.report.methods["step"].portable}
    assert {"aten.embedding.default", "aten.bitwise_xor.Tensor", "aten._log_softmax.default"} <= outside
    assert not outside & {"aten.linear.default", "aten.bmm.default", "aten._softmax.default", "aten.rms_norm.default"}
    session = saved(lowered, tmp_path)
    batch = llama_inputs()
    adapter = llm.initial_adapter()
    for seed in range(3):
        expected = llm.step(adapter, batch, seed=seed, lr=0.05, eps=1e-2)
        found = session.step(batch, seed=seed, lr=0.05, eps=1e-2, update=False)
        assert found.losses == pytest.approx(expected.losses.tolist(), abs=LOSS_ERROR)
        assert found.loss == pytest.approx(float(expected.loss), abs=LOSS_ERROR)
        # The update is float32 outside of the delegate: from the same gradients, the same adapter.
        gradients = torch.tensor(found.projected_gradients)
        again = llm.apply(adapter, seed=seed, lr=0.05, projected_gradients=gradients)
        for name, value in found.adapter.items():
            torch.testing.assert_close(value, again[name], rtol=1e-6, atol=1e-7)
    if soc == "SM8650":
        losses = session.fit([batch], 20, lr=0.05, eps=1e-2, seed=1).losses
        assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1


# Off by what half precision rounds, no ε divides it; in integers mostly by what the weights' eight bits change.
@on_simulator
@pytest.mark.parametrize(
    ("model", "precision", "tolerance"), [("llama", "fp16", 1e-2), ("llama", "16a8w", 5e-2), ("mlp", "16a8w", 2e-2)]
)
def test_directional_derivatives_agree_with_eager(model: str, precision: str, tolerance: float):
    estimator, batch = mz.ForwardGradient(queries=2), llama_inputs() if model == "llama" else MLP_INPUTS
    if model == "llama":
        program = mz.transform(llama(), batch, estimator=estimator)
    else:
        program = mz.transform(seeded(WideMlp()), batch, estimator=estimator, loss=cross_entropy)
    program = only(program, "step")
    calibration = [batch] if precision == "16a8w" else None
    lowered = lowering.lower(program, target="qnn", precision=precision, calibration=calibration)
    assert_one_binary(lowered, "step")
    # Eight seeds, four of which the calibration has not seen.
    found = lowering.fidelity(lowered, program, [batch] * 8)
    assert not found.simulated
    assert found.gradient_error < tolerance
    assert found.loss_error < 1e-2


def test_an_unknown_chip_lists_the_known(mlp: mz.TrainingProgram):
    with pytest.raises(lowering.InvalidOption, match=r"soc='SM9999'.*SM8650, SM8750"):
        lowering.lower(mlp, target="qnn", soc="SM9999")


@on_simulator
def test_a_quantized_language_model_computes_what_its_rounded_graph_does_and_learns(
    llm: mz.TrainingProgram, tmp_path: Path
):
    batch = llama_inputs()
    options: Any = {"target": "qnn", "precision": "16a8w", "calibration": [batch]}
    lowered = lowering.lower(only(llm, "step", "apply"), **options)
    assert_one_binary(lowered, "step")
    assert lowered.manifest.options["precision"] == "16a8w"
    assert lowered.manifest.options["calibration"] == digest_of([batch])
    session = saved(lowered, tmp_path)
    found = session.step(batch, **SCALARS, update=False)
    outputs = rounded_step(llm, batch, options)
    # Sums are rounded to 16 bits in another place than in PyTorch: a few of the last of 65,536 steps.
    assert found.losses == pytest.approx(outputs["losses"].tolist(), abs=2e-3)
    # Eight bits a weight are an error of the model, not of the lowering.
    exact = llm.step(llm.initial_adapter(), batch, **SCALARS)
    assert found.losses == pytest.approx(exact.losses.tolist(), rel=2e-2)
    losses = session.fit([batch], 20, lr=0.05, eps=1e-2, seed=1).losses
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1


def rounded_step(program: mz.TrainingProgram, batch: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The step's quantized graph, run in PyTorch: what rounding alone does."""
    target = get_target("qnn").configured({"precision": options["precision"]})
    described = {**program.manifest(), "target": "qnn", "program_id": "test"}
    measured = measured_on(program, Manifest.model_validate(described), options["calibration"])
    legal = legalize("step", program.core("step"), target, measured).program
    scalars = {name: torch.tensor([value]) for name, value in SCALARS.items()}
    given = {**program.initial_adapter(), **program.frozen_adapter(), **batch, **scalars}
    spec = Manifest.model_validate(described).methods["step"]
    outputs = legal.module()(*(given[each.name] for each in spec.inputs))
    return dict(zip((each.name for each in spec.outputs), outputs, strict=True))


@on_simulator
def test_eight_bits_for_everything(mlp: mz.TrainingProgram, tmp_path: Path):
    """LayerNorm, GELU and a wide softmax in 8 bits, where a logit has 256 values."""
    lowered = lowering.lower(only(mlp, "step", "apply"), target="qnn", precision="8a8w", calibration=[MLP_INPUTS])
    assert_one_binary(lowered, "step")
    session = saved(lowered, tmp_path)
    batch = dict(zip(session.manifest.batch.inputs, MLP_INPUTS, strict=True))
    expected = mlp.step(mlp.initial_adapter(), MLP_INPUTS, **SCALARS)
    found = session.step(batch, **SCALARS, update=False)
    assert found.losses == pytest.approx(expected.losses.tolist(), rel=5e-2)
    assert len(set(found.losses)) > 1


def test_other_precisions_are_refused(mlp: mz.TrainingProgram, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(get_target("qnn")), "require", lambda self: None)
    with pytest.raises(lowering.InvalidOption, match=r"precision='16a4w'.*fp16, 16a8w, 8a8w"):
        lowering.lower(mlp, target="qnn", precision="16a4w")


def test_every_chip_is_one_that_executorch_knows():
    schema = pytest.importorskip("executorch.backends.qualcomm.serialization.qc_schema")
    known = {chip.name for chip in schema.QcomChipset} - {"UNKNOWN_SM"}
    (soc,) = (option for option in get_target("qnn").options if option.name == "soc")
    assert set(soc.choices) == known


class Sorted(nn.Module):
    """A sort in the midst of the model: QNN has none that our body could hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Lora(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cumprod(torch.sigmoid(self.first(x)), 1))


@on_simulator
def test_an_operator_that_qnn_does_not_take_is_named():
    inputs = (random(3, 6), integers(4, 3))
    program = mz.transform(seeded(Sorted()), inputs, estimator=mz.TwoSided(queries=1), loss=cross_entropy)
    with pytest.raises(lowering.OperatorNotTaken, match=r"cumprod.*test_qnn\.py.*lower for target 'xnnpack'") as caught:
        lowering.lower(only(program, "step", "apply"), target="qnn")
    assert caught.value.method == "step"


def test_missing_host_libraries_are_said_with_what_brings_them(mlp: mz.TrainingProgram, monkeypatch):
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setattr("runtime_driver.backends.qnn.host.find_spec", lambda name: None)
    monkeypatch.setattr("runtime_driver.backends.qnn.host.on_host", lambda: True)
    with pytest.raises(lowering.TargetUnavailable, match=r"libQnnHtp\.so.*pip install.*QNN_SDK_ROOT"):
        lowering.lower(mlp, target="qnn")
    state = lowering.available()["qnn"]
    assert not state.ready
    assert not state.runs
    assert "onnxruntime-qnn==2.3.0" in state.remedy


def test_an_sdk_without_host_libraries_is_said_with_its_path(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    monkeypatch.setattr("runtime_driver.backends.qnn.host.on_host", lambda: True)
    with pytest.raises(
        qnn_host.HostLibrariesMissing, match=r"lib/x86_64-linux-clang has no libQnnSystem\.so"
    ) as caught:
        qnn_host.find()
    assert str(tmp_path) in str(caught.value)


def test_an_sdk_goes_before_the_package(monkeypatch, tmp_path: Path):
    folder = tmp_path / "lib" / "x86_64-linux-clang"
    folder.mkdir(parents=True)
    for name in ("libQnnSystem.so", "libQnnHtp.so"):
        (folder / name).touch()
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    monkeypatch.setattr("runtime_driver.backends.qnn.host.on_host", lambda: True)
    assert qnn_host.find() == qnn_host.HostLibraries(folder, "QNN_SDK_ROOT")


def test_other_machines_have_no_host_libraries(monkeypatch):
    monkeypatch.setattr("runtime_driver.backends.qnn.host.on_host", lambda: False)
    with pytest.raises(qnn_host.HostLibrariesMissing, match="Linux on x86-64"):
        qnn_host.find()


@on_simulator
def test_this_machine_compiles_and_runs():
    state = lowering.available()["qnn"]
    assert state.ready
    assert state.runs
    assert os.environ.get("QNN_SDK_ROOT") is not None or qnn_host.find().source == "onnxruntime-qnn"


@on_simulator
def test_the_runtime_is_loaded_before_qualcomm_s_libraries():
    """Else exceptions of the one are caught by the C++ runtime of the other, and a damaged .pte ends the process."""
    code = (
        "import sys; from runtime_driver.backends import qnn; qnn.enable(); "
        "sys.exit('executorch.extension.pybindings._C' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
