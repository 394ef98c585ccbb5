"""InsertMpLora: products with trainable factors become grouped products."""

from __future__ import annotations

from typing import Any

import pytest
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

    def test_another_use_of_a_factor_is_refused(self) -> None:
        model: Any = Tiny(lambda y: y + model.layer.lora_B.weight.sum())
        with pytest.raises(mz.UnsupportedOp, match=r"'layer.lora_B.weight' is used by something else.*aten.sum"):
            before(self.kind, model, rows()).apply()

    def test_both_factors_of_a_site(self) -> None:
        """The second product reads the first, which has just been replaced."""
        model = Tiny()
        program = mz.transform(model, rows(), loss=F.cross_entropy, trainable="lora_A+lora_B")
        assert str(program).count("mobizo.mp_lora(") == 2
        mz.verify(program, model, rows())
