"""FoldConstants: what depends on no input is computed once, at compile time."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_passes import passes
from mobizo_passes.graph.facts import role
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestFoldConstants(PassContract):
    kind = passes.FoldConstants

    def example(self) -> Stage:
        def body(y: Tensor) -> Tensor:
            return y.masked_fill(torch.arange(4)[None, :] > torch.arange(2)[:, None] + 1, -5.0)

        return before(self.kind, Tiny(body), rows())

    def test_it_fires(self) -> None:
        stage = self.example()
        after = stage.apply()
        assert "aten.arange.default" in targets(stage.ir)
        assert not {"aten.arange.default", "aten.gt.Tensor"} & set(targets(after))
        (mask,) = after.placeholders("constant")
        assert after.state[role(mask).name].int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]

    def test_what_reads_an_input_or_a_parameter_is_left_alone(self) -> None:
        def body(y: Tensor) -> Tensor:
            return y + torch.zeros_like(y)

        class Scaled(Tiny):
            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) * self.layer.base.weight.sum()

        for model in (Tiny(body), Scaled()):
            stage = before(self.kind, model, rows())
            assert stage.count() == 0

    def test_large_results_stay_computed(self) -> None:
        stage = self.example()
        assert passes.FoldConstants(max_bytes=24)(stage.ir) == 1
        assert "aten.gt.Tensor" in targets(stage.ir)

    def test_equal_results_are_stored_once(self) -> None:
        def body(y: Tensor) -> Tensor:
            return y * torch.arange(4) + y / (torch.arange(4))

        assert len(before(self.kind, Tiny(body), rows()).apply().placeholders("constant")) == 1
