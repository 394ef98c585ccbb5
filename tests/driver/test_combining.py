"""Sums over batches become the loss of the whole data set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from runtime_driver import BatchError
from runtime_driver.combining import LossTotals
from runtime_driver.format import EvaluationSpec, Manifest, ManifestError
from tests.driver import tiny

MEAN = {"sum": "loss_sum_0", "mean": True, "weight": "loss_weight_0"}


def totals(**fields: Any) -> LossTotals:
    return LossTotals(EvaluationSpec.model_validate(fields))


def test_rows_that_fill_up_do_not_count():
    one = totals(terms=[MEAN])
    one.add({"loss_sum_0": torch.tensor([1.0, 2.0, math.nan]), "loss_weight_0": torch.tensor([1.0, 3.0, 9.0])}, 2)
    one.add({"loss_sum_0": torch.tensor([6.0, 1.0, 2.0]), "loss_weight_0": torch.tensor([2.0, 1.0, 1.0])}, 3)
    assert one.value == pytest.approx(12 / 8)
    assert (one.rows, one.batches) == (5, 2)


def test_a_mean_without_weights_counts_rows():
    one = totals(terms=[{"sum": "loss_sum_0", "mean": True, "per_row": 4.0}])
    one.add({"loss_sum_0": torch.tensor([8.0, 8.0])}, 2)
    one.add({"loss_sum_0": torch.tensor([2.0, 5.0])}, 1)
    assert one.value == pytest.approx(18 / 12)


def test_steps_and_scalars():
    steps = [{"op": "sqrt", "args": ["t0"]}, {"op": "div", "args": ["n0", "rows"]}, {"op": "add", "args": ["n1", "s0"]},
             {"op": "gt", "args": ["n2", 1.0]}, {"op": "where", "args": ["n3", "n2", 7.0]}]  # fmt: skip
    one = totals(
        terms=[{"sum": "loss_sum_0", "mean": False}], scalars=[{"name": "loss_scalar_0"}], steps=steps, result="n4"
    )
    one.add({"loss_sum_0": torch.tensor([9.0, 0.0]), "loss_scalar_0": torch.tensor(0.5)}, 1)
    assert one.value == pytest.approx(3.5)
    one.add({"loss_sum_0": torch.tensor([3.0, 4.0]), "loss_scalar_0": torch.tensor(0.5)}, 2)
    assert one.value == pytest.approx(4 / 3 + 0.5)


def test_counts_add_up_and_other_scalars_stay_the_same():
    fields: dict[str, Any] = {"terms": [{"sum": "loss_sum_0", "mean": False}], "result": "n0"}
    fields["steps"] = [{"op": "div", "args": ["t0", "s0"]}]
    count = totals(scalars=[{"name": "loss_scalar_0", "adds_up": True}], **fields)
    fixed = totals(scalars=[{"name": "loss_scalar_0"}], **fields)
    first = {"loss_sum_0": torch.tensor([6.0]), "loss_scalar_0": torch.tensor(3)}
    second = {"loss_sum_0": torch.tensor([2.0]), "loss_scalar_0": torch.tensor(1)}
    for one in (count, fixed):
        one.add(first, 1)
    count.add(second, 1)
    assert count.value == pytest.approx(2)
    with pytest.raises(BatchError, match="holds no batch is 1 here, and was 3 before"):
        fixed.add(second, 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"terms": [MEAN]}, r"names \['loss_sum_0', 'loss_weight_0'\], which `loss` does not return"),
        ({"steps": [{"op": "neg", "args": ["n0"]}]}, r"step 0 reads \['n0'\], which is not known there"),
        ({"steps": [{"op": "neg", "args": [1.0, 2.0]}]}, "takes 1 arguments, found 2"),
        ({"result": "t0"}, "the result 't0' is not known"),
        ({"steps": [{"op": "system", "args": ["rows"]}]}, "evaluation.steps.0.op|input should be"),
    ],
)
def test_a_manifest_that_can_not_be_followed_is_refused(change: dict[str, Any], problem: str):
    with pytest.raises(ManifestError, match=problem):
        Manifest.from_dict(tiny.manifest_dict(format_version=2, evaluation={"result": 0.0, **change}))
