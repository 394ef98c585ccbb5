"""The registry: what a target is, how options reach it, what is said of what is missing."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
from lowering.errors import InvalidOption, TargetNameTaken, UnknownOption
from lowering.identity import program_id
from lowering.targets import TARGETS, Target, TargetOption, base, get_target, register
from lowering.targets.availability import Availability, executorch_availability
from lowering.targets.options import RESERVED
from tests.lowering.small import Program
from tests.models import Lora, cross_entropy, integers, random, seeded


class DummyTarget(Target):
    """A fourth target, in one class: portable passes, no delegate, one option of its own."""

    name = "dummy"
    options = (TargetOption("speed", ("slow", "fast"), "slow", "how fast"),)
    backend = "DummyBackend"
    runtime = "buy one"

    def availability(self) -> Availability:
        return executorch_availability(self.name)

    @property
    def passes(self):
        from lowering.targets.portable.pipeline import PASSES

        return PASSES

    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> None:
        return None


@pytest.fixture
def dummy():
    yield register(DummyTarget())
    del TARGETS["dummy"]


def test_a_fourth_target_is_one_class(dummy, tmp_path):
    program = Program(1)
    lowered = lowering.lower(program, target="dummy", speed="fast")
    assert lowered.manifest.target == "dummy"
    assert lowered.manifest.options == {"speed": "fast"}
    assert lowered.save(tmp_path / "model.pte").exists()
    state = lowering.available()["dummy"]
    assert state.ready
    assert not state.runs
    assert "no DummyBackend" in state.runs_missing
    assert state.runs_remedy == "buy one"
    with pytest.raises(lowering.UnknownTarget, match="dummy, portable, qnn, vulkan, xnnpack"):
        lowering.lower(program, target="tpu")


def test_options_tell_programs_apart():
    ids = {program_id({}, "weights", "dummy", {"speed": speed}) for speed in ("slow", "fast")}
    assert len(ids) == 2


#: As they entered the ids of programs since each target exists; a program that is lowered again keeps its id.
RECORDED = {
    "xnnpack": {},
    "portable": {},
    "vulkan": {"precision": "fp32"},
    "qnn": {"soc": "SM8650", "precision": "fp16", "weights": "separate"},
}


@pytest.mark.parametrize("name", RECORDED)
def test_defaults_enter_a_program_s_id_as_they_always_did(name):
    assert get_target(name).recorded == RECORDED[name]


OFFERED = [
    (name, option.name, value)
    for name, target in TARGETS.items()
    for option in target.all_options
    for value in option.choices
]


@pytest.mark.parametrize(("name", "option", "value"), OFFERED)
def test_what_is_offered_is_accepted(name, option, value):
    target = get_target(name).configured({option: value})
    assert target.chosen[option] == value
    assert target.passes
    assert target.loss_tolerance > 0


def test_an_option_that_came_later_changes_no_id_by_its_default(dummy):
    assert get_target("dummy").recorded == {"speed": "slow"}
    later = type("Later", (DummyTarget,), {"name": "later", "implied": frozenset({"precision", "speed"})})()
    assert later.recorded == {}
    assert later.configured({"speed": "fast"}).recorded == {"speed": "fast"}


def test_an_option_is_called_as_no_keyword_of_lower():
    keywords = set(inspect.signature(lowering.lower).parameters) - {"options"}
    assert keywords == RESERVED
    wrong = type("Wrong", (DummyTarget,), {"options": (TargetOption("check", ("a", "b"), "a", "which"),)})()
    with pytest.raises(lowering.OptionNameTaken, match="'check', which is a keyword of `lower` already"):
        register(wrong)


def test_a_name_is_taken_once(dummy):
    with pytest.raises(TargetNameTaken, match="'dummy' is registered already"):
        register(DummyTarget())


def test_options_are_checked_by_name_and_value(dummy):
    with pytest.raises(UnknownOption, match=r"'xnnpack' has no option 'soc': its options are precision, weights;"):
        lowering.lower(Program(1), target="xnnpack", soc="SM8650")
    with pytest.raises(InvalidOption, match=r"precision='8a8w' .*'xnnpack': expected one of fp32"):
        lowering.lower(Program(1), target="xnnpack", precision="8a8w")
    with pytest.raises(InvalidOption, match=r"weights='mapped' .*'xnnpack in fp16': expected one of packed"):
        lowering.lower(Program(1), target="xnnpack", precision="fp16", weights="mapped")
    with pytest.raises(UnknownOption, match=r"'dummy' has no option 'soc': its options are precision, speed"):
        lowering.lower(Program(1), target="dummy", soc="SM8650")
    with pytest.raises(InvalidOption, match=r"speed='warp' .*expected one of slow, fast"):
        lowering.lower(Program(1), target="dummy", speed="warp")


def test_configuring_a_target_leaves_the_registry_alone(dummy):
    assert get_target("dummy").configured({"speed": "fast"}).chosen == {"precision": "fp32", "speed": "fast"}
    assert get_target("dummy").chosen == {"precision": "fp32", "speed": "slow"}


def test_what_runs_here_is_what_the_runtime_registers(monkeypatch):
    states = lowering.available()
    assert states["xnnpack"].runs
    assert states["portable"].runs
    vulkan = states["vulkan"]
    assert vulkan.ready
    if not vulkan.runs:
        assert "has no VulkanBackend" in vulkan.runs_missing
        assert "EXECUTORCH_BUILD_VULKAN" in vulkan.runs_remedy
        assert "lowers here; does not run here" in str(vulkan)
    monkeypatch.setattr(base, "registered_backends", lambda: frozenset({"VulkanBackend"}))
    states = lowering.available()
    assert states["vulkan"].runs
    assert not states["xnnpack"].runs


def test_without_executorch_nothing_runs(monkeypatch):
    monkeypatch.setattr(base, "registered_backends", lambda: None)
    state = get_target("vulkan").survey()
    assert not state.runs
    assert "pip install" in state.runs_remedy


class Inverse(nn.Module):
    """Inverts a matrix for each example before LoRA: nothing in ExecuTorch does that."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Lora(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.linalg.inv(x + 5 * torch.eye(4))).sum(1)


@pytest.mark.parametrize("target", ["portable", "xnnpack", "vulkan"])
def test_an_operator_that_nothing_computes_is_named(target):
    inputs = (random(3, 4, 4), integers(4, 3))
    program = mz.transform(seeded(Inverse()), inputs, estimator=mz.TwoSided(queries=1), loss=cross_entropy)
    message = r"method '\w+': aten\.linalg_inv_ex.*test_targets\.py.*no kernel for it; write that part"
    with pytest.raises(lowering.KernelMissing, match=message) as caught:
        lowering.lower(program, target=target)
    assert caught.value.operator == "aten.linalg_inv_ex.default"


def test_without_a_runtime_kernels_are_not_judged(monkeypatch):
    """Then nobody knows: programs are lowered all the same."""
    monkeypatch.setattr("lowering.checks.registered_operators", lambda: None)
    assert lowering.lower(Program(1), target="portable").report.partitions == 0
    monkeypatch.setattr("lowering.checks.registered_operators", frozenset)
    with pytest.raises(lowering.KernelMissing):
        lowering.lower(Program(1), target="portable")
