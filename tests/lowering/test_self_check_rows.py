"""Lowered rows of the coverage table and random models, each held against its eager form by the self-check.

A few with every run; all rows on the portable target, and a tenth of the random models on XNNPACK, under the profile
`deep` (`HYPOTHESIS_PROFILE=deep`), which is for a night.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given, seed, settings

import lowering
import mobizo_passes as mz
from tests.coverage.catalogue import ROWS
from tests.coverage.row import QUERIES, Row
from tests.graphs.cases import Case, cases
from tests.lowering.test_self_check import Only

DEEP = bool(settings.default and settings.default.max_examples >= 1000)
AGREEING = tuple(row for row in ROWS if row.refused is None)
CHOSEN = AGREEING if DEEP else tuple(row for row in AGREEING if str(row) == "windowed-attention-rolled-image")


def test_there_are_rows() -> None:
    assert CHOSEN


@pytest.mark.parametrize("row", CHOSEN, ids=str)
def test_a_row_on_the_portable_target(row: Row) -> None:
    options = {"estimator": mz.TwoSided(queries=QUERIES), **row.options}
    program = mz.transform(row.build(), row.inputs(), **options)
    methods = program.methods if DEEP else ("step",)
    report = lowering.lower(Only(program, *methods), target="portable").report
    assert report.self_check.compared


def test_random_models_on_xnnpack() -> None:
    @seed(0)
    @settings(max_examples=500 if DEEP else 1, deadline=None)
    @given(case=cases())
    def lowers_to_the_same(case: Case) -> None:
        assume(not case.coupled)
        try:
            program = mz.transform(case.build(), case.inputs(), loss=case.loss_fn(), estimator=mz.TwoSided(queries=1))
        except mz.UnsupportedOp:
            return
        report = lowering.lower(Only(program, "step"), target="xnnpack").report
        assert report.self_check.compared

    lowers_to_the_same()
