"""LiftAdapter: trainable parameters become inputs."""

from __future__ import annotations

import torch

from mobizo_passes import passes
from mobizo_passes.graph.facts import role
from tests.passes.contract import PassContract, Stage, Tiny, before, rows


class TestLiftAdapter(PassContract):
    kind = passes.LiftAdapter

    def example(self) -> Stage:
        return before(self.kind, Tiny(layers=2), rows())

    def test_it_fires(self) -> None:
        stage = self.example()
        after = stage.apply()
        lifted = [role(n).name for n in after.placeholders("adapter")]
        assert lifted == ["layer.lora_B.weight", "more.0.lora_B.weight"]
        assert not set(lifted) & set(after.state)
        kinds = [role(n).kind for n in after.placeholders()]
        assert kinds == ["parameter"] * 4 + ["adapter"] * 2 + ["batch"] * 2

    def test_other_names_are_left_alone(self) -> None:
        stage = self.example()
        assert passes.LiftAdapter(("layer.lora_X.weight", "x"))(stage.ir) == 0
        assert stage.ir.placeholders("adapter") == []

    def test_the_adapter_counts_from_now_on(self) -> None:
        stage = self.example()
        after = stage.apply()
        old = stage.run(after)
        stage.values["layer.lora_B.weight"] = stage.values["layer.lora_B.weight"] + 1
        assert not torch.equal(stage.run(after)["loss"], old["loss"])
