"""`check_lowered` on inputs of a test's choice."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
from lowering.testing import check_lowered
from mobizo_passes.testing.models import random, seeded
from tests.passes.contract import Tiny, rows


def transformed(seed: int = 0) -> mz.TrainingProgram:
    return mz.transform(seeded(Tiny(), seed), rows(), loss=F.cross_entropy, estimator=mz.OneSided(1))


def test_a_lowered_program_is_held_against_its_eager_form():
    program = transformed()
    lowered = lowering.lower(program, target="portable", check=False)
    x, labels = rows()
    adapter = {name: random(*value.shape) for name, value in program.initial_adapter().items()}
    checked = check_lowered(lowered, program, (random(*x.shape, seed=3), labels.flip(0)), adapter=adapter)
    assert {each.method for each in checked.compared} == set(program.methods)
    wrong = r"method 'step', beside its eager form: output 'loss' is .* apart, .*; lower for another target and "
    with pytest.raises(lowering.SelfCheckFailed, match=wrong) as failed:
        check_lowered(lowered, transformed(seed=1))
    assert "withheld" not in str(failed.value)
    assert "check=False" not in str(failed.value)
    with pytest.raises(lowering.NonFiniteExample, match=r"on the inputs and before .* or check it on other inputs$"):
        check_lowered(lowered, program, (x * float("inf"), labels))
    inside = lowering.lower(program, target="portable", adapter="internal", check=False)
    assert check_lowered(inside, program).compared
    with pytest.raises(lowering.LoweringError, match="holds its adapter inside"):
        check_lowered(inside, program, adapter=adapter)
