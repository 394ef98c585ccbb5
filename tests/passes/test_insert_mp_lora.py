"""InsertMpLora: products with trainable factors become grouped products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import mobizo_passes as mz
from mobizo_passes import passes
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, targets


class TestInsertMpLora(PassContract):
    kind = passes.InsertMpLora

    def example(self) -> Stage:
        return before(self.kind, Tiny(), rows())

    def test_it_fires(self) -> None:
        stage = before(self.kind, Tiny(layers=3), rows())
        after = stage.apply()
        assert stage.count() == 3
        assert targets(after).count("mobizo.mp_lora.default") == 3
        for adapter in after.placeholders("adapter"):
            (user,) = adapter.users
            assert str(user.target) == "aten.unsqueeze.default"

    def test_frozen_products_are_left_alone(self) -> None:
        stage = self.example()
        linear = targets(stage.ir).count("aten.linear.default")
        assert targets(stage.apply()).count("aten.linear.default") == linear - 1

    def test_a_product_without_the_batch_is_left_alone(self) -> None:
        """It differs per group only: the walk stacks it, no batch is fused."""
        model: Any = Tiny(lambda y: y + (torch.eye(1) @ model.layer.lora_B.weight.T).sum())
        stage = before(self.kind, model, rows())
        assert stage.count() == 1
        assert "aten.matmul.default" in targets(stage.apply())

    def test_both_factors_of_a_site(self) -> None:
        """The second product reads the first, which has just been replaced."""
        model = Tiny()
        program = mz.transform(model, rows(), loss=F.cross_entropy, trainable="lora_A+lora_B")
        assert str(program).count("mobizo.mp_lora(") == 2
        mz.verify(program, model, rows())
