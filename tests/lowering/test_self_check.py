"""The self-check: a lowered program is run once beside its eager form, and withheld where they differ."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
from lowering import selfcheck
from lowering.errors import NonFiniteExample, SelfCheckFailed
from lowering.method_runner import MethodRunner
from lowering.report import Compared
from lowering.selfcheck import deviation_of, gradient_bound
from lowering.targets import TARGETS
from lowering.targets.portable.target import PortableTarget
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass
from runtime_driver.format import Manifest
from tests.lowering.small import Program
from tests.passes.test_layouts import IMAGE, LAST, Lora, Net, channels_last, nhwc, odd_base, odd_factors
from tests.passes.test_layouts import LABELS as CLASSES
from tests.passes.test_masked_rows import IDS, LABELS, MASK, Attention, loss
from tests.self_check import only

aten = torch.ops.aten


@dataclass(frozen=True)
class Spoil(Pass):
    """A tanh becomes a sigmoid: what a wrong kernel would do."""

    name: ClassVar[str] = "spoil"

    def rewrite(self, ir: Ir) -> int:
        for node in ir.find(aten.tanh.default):
            node.target = aten.sigmoid.default
        return 0


class Spoilt(PortableTarget):
    """Portable, with the pass `Spoil` at the end."""

    @property
    def passes(self) -> Sequence[Any]:
        return (*super().passes, Spoil())


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 6).to(dtype)
        self.first, self.head = Lora(6, 8), Lora(8, 4)
        for site in (self.first, self.head):
            site.base.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for site in (self.first, self.head):
            low = site.lora_B(site.lora_A(x.float())).to(x.dtype)
            x = torch.tanh(site.base(x) + low)
        return x[:, -1].float()


def transformed(model: nn.Module, inputs: tuple[Tensor, ...], fn: Any = F.cross_entropy) -> mz.TrainingProgram:
    return mz.transform(model.eval(), inputs, loss=fn, estimator=mz.TwoSided(queries=2))


@pytest.fixture(scope="module")
def program() -> mz.TrainingProgram:
    return transformed(Tiny(), (IDS, CLASSES))


def compared(found: tuple[Compared, ...]) -> set[tuple[str, str]]:
    return {(each.method, each.output) for each in found}


@pytest.mark.parametrize("adapter", ["external", "internal"])
def test_every_output_is_compared_and_nothing_is_left(program, adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    external = adapter == "external"
    report = lowering.lower(program, target="portable", adapter=adapter, external_weights=external).report
    manifest = program.manifest(adapter)
    outputs = {(m, each["name"]) for m, spec in manifest["methods"].items() for each in spec["outputs"]}
    assert compared(report.self_check.compared) == outputs
    assert all(each.deviation <= each.tolerance for each in report.self_check.compared)
    assert "every output agrees" in str(report)
    assert not list(tmp_path.iterdir())
    if external:
        # apply repeats what step gave, bit for bit
        exact = [each for each in report.self_check.compared if each.method == "apply" and each.tolerance == 0]
        assert {each.output for each in exact} == set(program.initial_adapter())


def test_a_difference_withholds_the_program(program, monkeypatch):
    monkeypatch.setitem(TARGETS, "portable", Spoilt())
    with pytest.raises(SelfCheckFailed, match=r"self-check.*eager program's is.*withheld.*--no-check") as caught:
        lowering.lower(only(program, "step"), target="portable")
    assert (caught.value.method, caught.value.output) == ("step", "loss")
    assert caught.value.deviation > 1e-5


def test_an_error_of_the_runtime_is_reported_the_same_way(program, tmp_path):
    lowered = lowering.lower(only(program, "step"), target="portable", check=False)
    assert "self-check: not run: switched off" in str(lowered.report)
    path = lowered.save(tmp_path / "m.pte")
    manifest = program.manifest()["methods"]["step"]["inputs"]
    wrong = [torch.zeros([7, *each["shape"]]) for each in manifest]
    with (
        pytest.raises(SelfCheckFailed, match=r"'step', self-check.*the runtime fails \(.*withheld") as caught,
        MethodRunner("step", str(path), None) as run,
    ):
        run(wrong)
    assert (caught.value.output, caught.value.deviation) == (None, float("inf"))


def test_an_example_without_a_finite_loss_is_named(monkeypatch):
    unlabelled = torch.full_like(CLASSES, -100)
    made = transformed(Tiny(), (IDS, unlabelled))
    with pytest.raises(NonFiniteExample, match=r"before any update, 1 of 1 values of output 'loss' are not finite"):
        lowering.lower(only(made, "step"), target="portable")


def test_a_program_without_example_inputs_says_so(monkeypatch):
    class Without:
        def __init__(self) -> None:
            made = Program(layers=1)
            self.core, self.manifest = made.core, made.manifest
            self.initial_adapter, self.frozen_adapter = made.initial_adapter, made.frozen_adapter

    target = TARGETS["portable"]
    assert selfcheck.why_not(target, Without(), None) == "the program keeps no example inputs"
    assert selfcheck.why_not(target, Program(layers=1), None) is None
    assert "no VulkanBackend" in str(selfcheck.why_not(TARGETS["vulkan"], Program(layers=1), None))


@pytest.mark.parametrize("target", ["portable", "xnnpack"])
def test_odd_layouts_give_the_model_s_losses(target):
    """Two of the forms at once; tests/passes/test_layouts.py has them one by one."""
    net = odd_base(odd_factors(channels_last(Net(lambda x: x.contiguous(memory_format=LAST)))))
    report = lowering.lower(only(transformed(net, (nhwc(IMAGE), CLASSES)), "step"), target=target).report
    assert report.self_check.compared


def test_masked_rows_do_not_reach_the_losses_on_xnnpack():
    made = transformed(Attention("masked_fill"), (IDS, MASK, LABELS), loss)
    report = lowering.lower(only(made, "step"), target="xnnpack").report
    assert report.self_check.compared


@pytest.mark.parametrize(("dtype", "target"), [("float16", "xnnpack")])
def test_half_precision_weights_are_widened_and_it_is_said(dtype, target):
    made = transformed(Tiny(getattr(torch, dtype)), (IDS.int(), CLASSES))
    report = lowering.lower(only(made, "step", "loss"), target=target).report
    assert report.widened == (dtype,)
    assert f"the model has {dtype} values: they are stored and computed in float32 here" in str(report)
    own = [each for each in report.self_check.compared if (each.method, each.output) == ("loss", "loss")]
    # Once beside the float32 form, once beside the model as it is.
    assert [each.tolerance < 1e-3 for each in own] == [True, False]


def test_deviations():
    a = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    assert deviation_of(a, a) == (0.0, (0, 0))
    assert deviation_of(a, a + torch.tensor([0.0, 0.5])) == (0.5, (0, 1))
    assert deviation_of(a, torch.tensor([[1.0, float("nan")], [0.0, float("inf")]]))[0] == float("inf")
    assert deviation_of(a, torch.tensor([[1.0, 2.0], [7.0, 3.0]])) == (float("inf"), (1, 1))
    assert deviation_of(torch.tensor([True, False]), torch.tensor([True, True])) == (1.0, (1,))


@pytest.mark.parametrize("estimator", [mz.TwoSided(queries=2), mz.OneSided(queries=3, normalize="std")])
def test_the_gradients_bound_holds(estimator):
    """For losses that are off by `error` in any direction, no projected gradient is off by more."""
    from mobizo_passes.reference import projected_gradients

    made = mz.transform(Tiny().eval(), (IDS, CLASSES), loss=F.cross_entropy, estimator=estimator)
    manifest = Manifest.model_validate({**made.manifest(), "target": "portable", "program_id": "p"})
    losses = torch.linspace(1.0, 1.5, estimator.groups)
    exact = projected_gradients(losses, selfcheck.EPS, estimator)
    error = 1e-3
    bound = gradient_bound(manifest, {"losses": losses, "projected_gradients": exact}, error)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        moved = losses + error * (2 * torch.randint(2, losses.shape, generator=generator) - 1)
        assert float((projected_gradients(moved, selfcheck.EPS, estimator) - exact).abs().max()) <= bound
