"""StackNoise: the noise of equal sites in one draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_passes import passes
from mobizo_passes.graph.facts import facts
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestStackNoise(PassContract):
    kind = passes.StackNoise

    def example(self) -> Stage:
        return before(self.kind, Tiny(layers=2), rows())

    def compare(self, old: dict[str, Tensor], new: dict[str, Tensor], stage: Stage) -> None:
        assert all(torch.equal(new[name], value) for name, value in old.items()), "the same bits"

    def test_it_fires(self) -> None:
        stage = self.example()
        assert targets(stage.ir).count("mobizo.noise.default") == 2
        after = targets(stage.apply())
        assert after.count("mobizo.noise.default") == 0
        assert after.count("mobizo.noise_stack.default") == 1

    def test_a_shape_of_its_own_is_left_alone(self) -> None:
        class Mixed(Tiny):
            def __init__(self) -> None:
                super().__init__(layers=2)
                self.more[0] = nn.Sequential(nn.Identity())
                self.wide = Tiny()

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x) + F.pad(self.wide.layer(x)[:, :3], (0, 1))

        single = before(self.kind, Tiny(), rows())
        assert single.count() == 0
        assert before(self.kind, Mixed(), rows()).count() == 2

    def test_sites_keep_their_marks(self) -> None:
        after = self.example().apply()
        marks = [facts(n).noise_of for n in after.graph.nodes if facts(n).noise_of]
        assert sorted(marks) == ["layer.lora_B.weight", "more.0.lora_B.weight"]
