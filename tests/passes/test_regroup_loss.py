"""RegroupLoss: one loss per group instead of one per batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes import passes
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestRegroupLoss(PassContract):
    kind = passes.RegroupLoss

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def compare(self, old: dict[str, Tensor], new: dict[str, Tensor], stage: Stage) -> None:
        assert list(new["losses"].shape) == [1]
        torch.testing.assert_close(new["losses"][0], old["loss"], rtol=1e-6, atol=1e-6)

    def test_it_fires(self) -> None:
        stage = self.example()
        assert stage.count() == 1
        assert "mobizo.reduce_loss.default" in targets(stage.apply())

    @pytest.mark.parametrize(
        ("loss", "count"),
        [
            (F.cross_entropy, 1),
            (lambda o, y: F.cross_entropy(o, y, reduction="sum"), 1),
            (lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 2.0, 0.5, 3.0])), 1),
            (lambda o, y: F.cross_entropy(o, y, ignore_index=1, label_smoothing=0.2), 1),
            (lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().mean() - o.sum() / 9, 3),
            (lambda o, y: F.nll_loss(o.log_softmax(1), y), 1),
            (lambda o, y: F.cross_entropy(o, y, reduction="none"), 1),
            (lambda o, y: o.square().mean().sqrt().exp(), 1),
        ],
    )
    def test_reductions(self, loss: Any, count: int) -> None:
        stage = before(self.kind, Tiny(), rows(), loss)
        assert stage.count() == count
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_an_unknown_reduction_is_refused(self) -> None:
        with pytest.raises(
            mz.UnsupportedOp, match=r"operator without a rule: %max_1 = aten.max.default.*\n  use a mean"
        ):
            before(self.kind, Tiny(), rows(), lambda o, y: o.max()).apply()

    def test_a_scalar_that_feeds_examples_again_is_refused(self) -> None:
        with pytest.raises(mz.BatchCoupled, match=r"reduced over the whole batch feeds %div = aten.div.Tensor"):
            before(self.kind, Tiny(), rows(), lambda o, y: F.cross_entropy(o / o.abs().mean(), y)).apply()

    def test_a_scalar_of_shared_values_may_feed_anything(self) -> None:
        def loss(outputs: Tensor, wanted: Tensor) -> Tensor:
            return ((outputs - wanted) / wanted.std()).square().mean()

        stage = before(self.kind, Tiny(), (rows()[0], torch.arange(8.0).reshape(2, 4)), loss)
        self.compare(stage.run(), stage.run(stage.apply()), stage)


def test_a_float64_loss_leaves_the_adapter_float32() -> None:
    model, batch = Tiny(), rows()
    program = mz.transform(model, batch, loss=lambda o, y: F.cross_entropy(o.double(), y))
    step = mz.verify(program, model, batch)
    assert {value.dtype for value in (step.losses, step.projected_gradients, *step.adapter.values())} == {torch.float32}
