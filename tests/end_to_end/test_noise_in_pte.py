"""The noise inside a .pte is, bit for bit, the noise of the eager reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
import runtime_driver
from tests.models import Mlp, seeded
from tests.passes.test_errors import mlp_inputs


@pytest.mark.parametrize("target", ["portable", "xnnpack"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_apply_gives_back_the_noise(noise: str, target: str, tmp_path: Path) -> None:
    program = mz.transform(
        seeded(Mlp()), mlp_inputs(), loss=F.cross_entropy, estimator=mz.TwoSided(queries=1), noise=noise
    )
    session = runtime_driver.Session(lowering.lower(program, target=target).save(tmp_path / "model.pte"))
    zero = {fqn: torch.zeros_like(value) for fqn, value in program.initial_adapter().items()}
    for seed in (0, 1, 7, 2**31 - 1):
        # 0 - 1/1 · (-1) · z = z, without rounding.
        session.adapter = zero
        session.apply(seed, 1.0, [-1.0])
        want = mz.reference.draw(zero, seed, 1, noise)
        assert all(torch.equal(session.adapter[fqn], want[fqn][0]) for fqn in zero)
        assert all(bool(value.any()) for value in session.adapter.values())
