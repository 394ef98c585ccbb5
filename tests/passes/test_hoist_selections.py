"""HoistSelections: select before computing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.passes import HoistSelections
from tests.passes.contract import PassContract, Tiny, left_alone, rewritten, sequences, token_loss


def text_of(*calls: str) -> str:
    """A program of an input [2, 5, 4], and a weight [4, 4] if it is read, whose last call is its output."""
    name, _, rest = calls[-1].partition(": ")
    weight = ["%w: f32[4, 4] = parameter 'w'"] if any("%w" in call for call in calls) else []
    head = [*weight, "%x: f32[2, 5, 4] = batch 'x'"]
    return "\n".join([*head, *calls, f"return {name}: {rest.partition(' = ')[0]} = logits"])


class TestHoistSelections(PassContract):
    one = HoistSelections()
    before = """
        %weight: f32[30, 4] = parameter 'head.w'
        %bias: f32[30] = parameter 'head.b'
        %words: i64[3] = constant 'words'
        %x: f32[2, 5, 4] = batch 'x'

        %relu: f32[2, 5, 4] = aten.relu(%x)
        %linear: f32[2, 5, 30] = aten.linear(%relu, %weight, %bias)
        %select: f32[2, 30] = aten.select(%linear, 1, -1)
        %index: f32[2, 3] = aten.index(%select, [None, %words])

        return %index: f32[2, 3] = logits
    """
    # Nothing of length 5 or 30 is computed.
    after = """
        %x: f32[2, 5, 4] = batch 'x'
        %head_w_selected_rows: f32[3, 4] = constant 'head_w_selected_rows'
        %head_b_selected_rows: f32[3] = constant 'head_b_selected_rows'

        %select_2: f32[2, 4] = aten.select(%x, 1, -1)  # | hoist-selections
        %relu_1: f32[2, 4] = aten.relu(%select_2)  # | hoist-selections
        %linear_2: f32[2, 3] = aten.linear(%relu_1, %head_w_selected_rows, %head_b_selected_rows)  # | hoist-selections

        return %linear_2: f32[2, 3] = logits
    """
    state: ClassVar[Mapping[str, Tensor]] = {"words": torch.tensor([28, 1, 0])}

    def test_a_value_with_another_reader_is_left_alone(self) -> None:
        left_alone(
            text_of(
                "%tanh: f32[2, 5, 4] = aten.tanh(%x)",
                "%select: f32[2, 4] = aten.select(%tanh, 1, -1)",
                "%mean: f32[2, 4] = aten.mean(%tanh, [1])",
                "%add: f32[2, 4] = aten.add(%select, %mean)",
            ),
            self.one,
        )

    @pytest.mark.parametrize("call", ["aten.cumsum(%x, 1)", "aten.softmax(%x, 1)", "aten.layer_norm(%x, [5, 4])"])
    def test_a_mixing_operator_is_not_crossed(self, call: str) -> None:
        left_alone(
            text_of(f"%mixed: f32[2, 5, 4] = {call}", "%select: f32[2, 4] = aten.select(%mixed, 1, -1)"), self.one
        )

    @pytest.mark.parametrize(
        ("calls", "first"),
        [
            (
                [
                    "%relu: f32[2, 5, 4] = aten.relu(%x)",
                    "%select: f32[2, 4] = aten.select(%relu, 1, -1)",
                    "%select_1: f32[2, 4] = aten.select(%x, 1, -1)",
                    "%relu_1: f32[2, 4] = aten.relu(%select_1)",
                    "%add: f32[2, 4] = aten.add(%select, %relu_1)",
                ],
                "aten.select(%x, 1, -1)",
            ),
            (
                [
                    "%layer_norm: f32[2, 5, 4] = aten.layer_norm(%x, [4])",
                    "%square: f32[2, 5, 4] = aten.square(%x)",
                    "%mean: f32[2, 5, 1] = aten.mean(%square, [-1], True)",
                    "%rsqrt: f32[2, 5, 1] = aten.rsqrt(%mean)",
                    "%mul: f32[2, 5, 4] = aten.mul(%layer_norm, %rsqrt)",
                    "%select: f32[2, 4] = aten.select(%mul, 1, 2)",
                ],
                "aten.select(%x, 1, 2)",
            ),
            (
                [
                    "%arange: f32[5] = aten.arange(5, dtype=f32)",
                    "%unsqueeze: f32[5, 1] = aten.unsqueeze(%arange, 1)",
                    "%mul: f32[2, 5, 4] = aten.mul(%x, %unsqueeze)",
                    "%slice_1: f32[2, 1, 4] = aten.slice(%mul, 1, 1, 2)",
                ],
                "aten.slice(%x, 1, 1, 2)",
            ),
            (
                [
                    "%gt: b8[2, 5, 4] = aten.gt(%x, 0)",
                    "%neg: f32[2, 5, 4] = aten.neg(%x)",
                    "%where: f32[2, 5, 4] = aten.where(%gt, %x, %neg)",
                    "%select: f32[2, 4] = aten.select(%where, 1, 0)",
                ],
                "aten.select(%x, 1, 0)",
            ),
            (
                [
                    "%tanh: f32[2, 5, 4] = aten.tanh(%x)",
                    "%slice_1: f32[2, 3, 4] = aten.slice(%tanh, 1, 0, end, 2)",
                    "%tanh_1: f32[2, 3, 4] = aten.tanh(%slice_1)",
                    "%select: f32[2, 4] = aten.select(%tanh_1, 1, -1)",
                ],
                "aten.slice(%x, 1, 0, end, 2)",
            ),
            (
                [
                    "%linear: f32[2, 5, 4] = aten.linear(%x, %w)",
                    "%linear_1: f32[2, 5, 4] = aten.linear(%linear, %w)",
                    "%select: f32[2, 4] = aten.select(%linear_1, 1, 3)",
                ],
                "aten.select(%x, 1, 3)",
            ),
        ],
        ids=["shared", "normed", "broadcast", "where", "two", "linear"],
    )
    def test_more_shapes(self, calls: list[str], first: str) -> None:
        assert any(f"= {first}" in line for line in rewritten(text_of(*calls), self.one))

    def test_positions_given_by_a_constant(self) -> None:
        text = """
            %at: i64[3] = constant 'at'
            %x: f32[2, 5, 4] = batch 'x'
            %y: f32[2, 1, 1] = batch 'y'
            %z: f32[1, 5, 1] = batch 'z'
            %mul: f32[2, 5, 4] = aten.mul(%x, %y)
            %add: f32[2, 5, 4] = aten.add(%mul, %z)
            %index: f32[2, 3, 4] = aten.index(%add, [None, %at])
            return %index: f32[2, 3, 4] = logits
        """
        after = rewritten(text, self.one, {"at": torch.tensor([4, 4, 0])})
        assert sum("aten.index(%x, " in line or "aten.index(%z, " in line for line in after) == 2


def test_a_selection_at_the_very_input_keeps_the_order_of_definitions() -> None:
    """Labelled positions, hoisted above everything, are still computed before they are read."""
    model, inputs = Tiny(), sequences()
    program = mz.transform(model, inputs, loss=token_loss)
    mz.verify(program, model, inputs)
    assert "mobizo.gather_rows(%x" in str(program)


def test_a_boolean_mask_is_not_picked_by_a_product() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.tiny(x).masked_fill(mask, -3.0)

    x, labels = sequences()
    inputs = (x, torch.arange(40).reshape(2, 5, 4) % 3 == 0, labels)
    model = Masked()
    program = mz.transform(model, inputs, loss=token_loss)
    mz.verify(program, model, inputs)
