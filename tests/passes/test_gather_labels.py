"""GatherLabels: logits only where there are labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes import passes
from tests.passes.contract import PassContract, Stage, Tiny, before, sequences, targets, token_loss


class TestGatherLabels(PassContract):
    kind = passes.GatherLabels

    def example(self) -> Stage:
        return before(self.kind, Tiny(), sequences(), token_loss, max_labels=1)

    def test_it_fires(self) -> None:
        after = self.example().apply()
        assert "mobizo.gather_rows.default" in targets(after)
        (loss,) = [n for n in after.graph.nodes if n.target is torch.ops.aten.cross_entropy_loss.default]
        scores: Any = loss.args[0]
        assert list(scores.meta["val"].shape) == [2, 4]

    def test_labels_everywhere_are_left_alone(self) -> None:
        x, labels = sequences()
        stage = before(self.kind, Tiny(), (x, labels.clamp(min=0)), token_loss, max_labels=5)
        assert stage.count() == 0

    def test_other_losses_are_left_alone(self) -> None:
        def unreduced(outputs: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(outputs.reshape(-1, 4), labels.reshape(-1), reduction="none").mean()

        def classes_second(outputs: Tensor, labels: Tensor) -> Tensor:
            # [B, C, T] with C = T: the shapes alone look like [B, T, V].
            return F.cross_entropy(outputs[:, :4].transpose(1, 2), labels[:, :4])

        def two(outputs: Tensor, labels: Tensor) -> Tensor:
            return token_loss(outputs, labels) + token_loss(2 * outputs, labels)

        for loss in (unreduced, classes_second, two):
            x, labels = sequences()
            stage = before(self.kind, Tiny(), (x, labels), loss, max_labels=1)
            assert stage.count() == 0
            model = Tiny()
            program = mz.transform(model, (x, labels), loss=loss)
            assert program.labels["max_labels"] is None
            mz.verify(program, model, (x, labels))

    def test_fewer_labels_than_were_compiled_for(self) -> None:
        """An example with fewer labels fills up with positions that the loss ignores."""
        stage = before(self.kind, Tiny(), sequences(), token_loss, max_labels=3)
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_logits_that_are_infinite_elsewhere_by_a_mask(self) -> None:
        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            return token_loss(outputs.masked_fill(torch.arange(4) == 0, float("-inf")), labels)

        model, inputs = Tiny(), sequences()
        program = mz.transform(model, inputs, loss=loss)
        assert bool(mz.verify(program, model, inputs).losses.isfinite().all())
