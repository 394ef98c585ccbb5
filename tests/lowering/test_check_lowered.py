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
    with pytest.raises(lowering.SelfCheckFailed, match=r"method 'step'.*output 'loss' is"):
        check_lowered(lowered, transformed(seed=1))
    inside = lowering.lower(program, target="portable", adapter="internal", check=False)
    assert check_lowered(inside, program).compared
    with pytest.raises(lowering.LoweringError, match="holds its adapter inside"):
        check_lowered(inside, program, adapter=adapter)
