"""FoldConstants: what depends on no input is computed once, at compile time."""

from __future__ import annotations

import pytest

from mobizo_passes.passes import FoldConstants
from tests.passes.contract import PassContract, left_alone, parsed, targets


class TestFoldConstants(PassContract):
    one = FoldConstants()
    before = """
        %y: f32[2, 4] = batch 'y'

        %arange: i64[4] = aten.arange(4)
        %unsqueeze: i64[1, 4] = aten.unsqueeze(%arange, 0)
        %arange_1: i64[2] = aten.arange(2)
        %unsqueeze_1: i64[2, 1] = aten.unsqueeze(%arange_1, 1)
        %add: i64[2, 1] = aten.add(%unsqueeze_1, 1)
        %gt: b8[2, 4] = aten.gt(%unsqueeze, %add)
        %masked_fill: f32[2, 4] = aten.masked_fill(%y, %gt, -5.0)

        return %masked_fill: f32[2, 4] = logits
    """
    after = """
        %y: f32[2, 4] = batch 'y'
        %gt_1: b8[2, 4] = constant 'gt'

        %masked_fill: f32[2, 4] = aten.masked_fill(%y, %gt_1, -5.0)

        return %masked_fill: f32[2, 4] = logits
    """

    def test_the_values_of_the_constant(self) -> None:
        _, new = self.run_pass()
        assert new.state["gt"].int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]

    @pytest.mark.parametrize("call", ["aten.zeros_like(%y)", "aten.neg(%w)"])
    def test_what_reads_an_input_or_a_parameter_is_left_alone(self, call: str) -> None:
        text = f"""
            %w: f32[2, 4] = parameter 'w'
            %y: f32[2, 4] = batch 'y'
            %z: f32[2, 4] = {call}
            %add: f32[2, 4] = aten.add(%y, %z)
            %mul: f32[2, 4] = aten.mul(%add, %w)
            return %mul: f32[2, 4] = logits
        """
        left_alone(text, self.one)

    def test_large_results_stay_computed(self) -> None:
        ir = parsed(self.before)
        assert FoldConstants(max_bytes=24)(ir) == 1
        assert "aten.gt.Tensor" in targets(ir)

    def test_equal_results_are_stored_once(self) -> None:
        text = """
            %y: f32[2, 4] = batch 'y'
            %a: i64[4] = aten.arange(4)
            %b: i64[4] = aten.arange(4)
            %mul: f32[2, 4] = aten.mul(%y, %a)
            %add: f32[2, 4] = aten.add(%mul, %b)
            return %add: f32[2, 4] = logits
        """
        ir = parsed(text)
        assert self.one(ir) == 2
        assert len(ir.placeholders("constant")) == 1
