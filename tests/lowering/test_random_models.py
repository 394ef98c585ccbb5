"""Random models, lowered to XNNPACK and held against their eager form by the self-check.

A tenth of what tests/graphs tries with every run, and many more under the profile `deep`. The rows of the coverage
table are lowered where they are transformed, in tests/coverage/test_coverage.py.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, seed, settings

import lowering
import mobizo_passes as mz
from mobizo_passes.testing.random_models.cases import RandomModel, random_models
from tests.self_check import DEEP, check_itself

# Hypothesis varies what it has already drawn once it has ten examples: short runs try more kinds of graph.
CHUNKS = 4


@pytest.mark.parametrize("chunk", [pytest.param(chunk, id=f"part{chunk}-{chunk}") for chunk in range(CHUNKS)])
def test_random_models_on_xnnpack(chunk: int) -> None:
    @seed(chunk)
    @settings(max_examples=125 if DEEP else 8)
    @given(case=random_models())
    def lowers_to_the_same(case: RandomModel) -> None:
        assume(not case.coupled)
        try:
            program = mz.transform(case.build(), case.inputs(), loss=case.loss_fn(), estimator=mz.TwoSided(queries=1))
        except mz.UnsupportedOp:
            return
        try:
            check_itself(program, "xnnpack", "step")
        except lowering.KernelMissing as refused:
            # ExecuTorch's runtime can't sort.
            if refused.operator != "aten.sort.default":
                raise

    lowers_to_the_same()
