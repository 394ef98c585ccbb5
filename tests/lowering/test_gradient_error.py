"""How far a lowered step is from float32: `lowering.fidelity`, and programs in half precision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
from lowering.report import Fidelity
from tests.lowering.small import only
from tests.models import Mlp, integers, random, seeded


def batch(seed: int = 0) -> tuple[Any, Any]:
    return random(3, 6) + seed, integers(4, 3)


def program(estimator: mz.Estimator) -> mz.TrainingProgram:
    return mz.transform(seeded(Mlp()), batch(), estimator=estimator, loss=F.cross_entropy)


@pytest.mark.parametrize("estimator", [mz.TwoSided(2), mz.Exact()], ids=str)
def test_float32_is_as_good_as_the_eager_program(estimator: mz.Estimator) -> None:
    step = only(program(estimator), "step")
    lowered = lowering.lower(step, target="portable", check=False, measure=[batch(), batch(1)])
    found = lowered.report.fidelity
    assert found is not None
    assert (found.batches, found.simulated, found.warning) == (2, False, "")
    assert found.differences == isinstance(estimator, mz.TwoSided)
    assert found.loss_error < 1e-6
    # A difference of losses carries fifty times their rounding.
    assert found.gradient_error < 1e-4
    assert found.sign_agreement == 1.0
    assert str(lowered.report).endswith(f"beside float32: {found.summary}")
    with pytest.raises(lowering.InvalidCalibration, match="measure=: there is no batch"):
        lowering.fidelity(lowered, step, [])
    with pytest.raises(lowering.InvalidCalibration, match="measure=: `x` of batch 1"):
        lowering.fidelity(lowered, step, [batch(), (random(2, 6), integers(4, 3))])


@pytest.mark.parametrize("target", ["xnnpack", "vulkan"])
def test_halves_keep_directional_derivatives(target: str) -> None:
    step = only(program(mz.ForwardGradient(2)), "step")
    lowered = lowering.lower(step, target=target, precision="fp16", check=False)
    found = lowering.fidelity(lowered, step, [batch()])
    assert found.simulated == (target == "vulkan")
    # 2 ** -11 at each of some ten roundings, and more than float32's.
    assert 1e-5 < found.gradient_error < 1e-2
    assert found.loss_error < 5e-3


def test_a_lost_gradient_is_a_warning_that_names_the_remedy() -> None:
    lost = Fidelity(1, 1e-3, 0.17, 0.75, simulated=False, differences=True)
    assert "gradients are off by 0.17 of the largest, above 0.1: use directional derivatives (Forw" in lost.warning
    assert lost.warning in str(lost)
    assert replace(lost, differences=False).warning.endswith("above 0.1: train in a higher precision")
    assert not replace(lost, gradient_error=0.1).warning
