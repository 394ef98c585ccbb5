"""Decompose: our operators become core ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mobizo_passes import passes
from mobizo_passes.graph.facts import facts
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestDecompose(PassContract):
    kind = passes.Decompose

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def test_it_fires(self) -> None:
        stage = self.example()
        assert [t for t in targets(stage.ir) if t.startswith("mobizo.")]
        after = targets(stage.apply())
        assert not [t for t in after if t.startswith("mobizo.")]
        assert "aten.bmm.default" in after
        assert "aten.cross_entropy_loss.default" not in after

    def test_a_reduced_loss_is_taken_apart_and_aten_nodes_are_left_alone(self) -> None:
        stage = before(passes.InsertMpLora, Tiny(), rows())
        assert "aten.cross_entropy_loss.default" in targets(stage.ir)
        assert passes.Decompose()(stage.ir) == 1
        assert "aten.linear.default" in targets(stage.ir)
        assert "aten.cross_entropy_loss.default" not in targets(stage.ir)

    def test_what_the_runtime_lacks_is_not_emitted(self) -> None:
        after = targets(self.example().apply())
        assert not [t for t in after if "__rshift__" in t or "__and__" in t or "rand" in t]

    def test_marks_survive(self) -> None:
        stage = self.example()
        after = stage.apply()
        assert [facts(n).noise_of for n in after.graph.nodes if facts(n).noise_of] == ["layer.lora_B.weight"]
        assert sum(facts(n).expanded for n in after.graph.nodes) >= sum(facts(n).expanded for n in stage.ir.graph.nodes)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda o, y: F.cross_entropy(o, y, weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), ignore_index=2),
            lambda o, y: F.cross_entropy(o, y, label_smoothing=0.3),
            lambda o, y: F.cross_entropy(o, F.one_hot(y, 4).float()),
            lambda o, y: F.cross_entropy(o, y, reduction="sum"),
        ],
    )
    def test_row_losses(self, loss: Any) -> None:
        stage = before(self.kind, Tiny(), rows(), loss)
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_one_table_for_all_sites(self) -> None:
        after = before(self.kind, Tiny(layers=3), rows()).apply()
        assert [k for k in after.state if "normal_quantiles" in k] == ["normal_quantiles"]
