"""GatherLabels: logits only where there are labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobizo_passes as mz
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import GatherLabels
from tests.passes.contract import PassContract, Tiny, left_alone, same_numbers, sequences, token_loss


class TestGatherLabels(PassContract):
    one = GatherLabels(max_labels=2)
    before = """
        %x: f32[2, 5, 4] = batch 'x'
        %labels: i64[2, 5] = batch 'labels'

        %view: f32[10, 4] = aten.reshape(%x, [10, 4])
        %view_1: i64[10] = aten.reshape(%labels, [10])
        %cross_entropy_loss: f32[] = aten.cross_entropy_loss(%view, %view_1)

        return %cross_entropy_loss: f32[] = loss
    """
    after = """
        %x: f32[2, 5, 4] = batch 'x'
        %labels: i64[2, 5] = batch 'labels'
        %label_order: f32[5] = constant 'label_order'

        %ne: b8[2, 5] = aten.ne(%labels, -100)  # | gather-labels
        %_to_copy: f32[2, 5] = aten._to_copy(%ne, dtype=f32)  # | gather-labels
        %mul: f32[2, 5] = aten.mul(%_to_copy, %label_order)  # | gather-labels
        %topk: (f32[2, 2], i64[2, 2]) = aten.topk(%mul, 2, -1, True, True)  # | gather-labels
        %getitem: i64[2, 2] = getitem(%topk, 1)  # | gather-labels
        %gather_rows: f32[2, 2, 4] = mobizo.gather_rows(%x, %getitem)  # | gather-labels
        %reshape: f32[4, 4] = aten.reshape(%gather_rows, [4, 4])  # | gather-labels
        %gather: i64[2, 2] = aten.gather(%labels, 1, %getitem)  # | gather-labels
        %reshape_1: i64[4] = aten.reshape(%gather, [4])  # | gather-labels
        %cross_entropy_loss: f32[] = aten.cross_entropy_loss(%reshape, %reshape_1)

        return %cross_entropy_loss: f32[] = loss
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """One, two and no labels in an example: what is missing is filled up with positions that the loss ignores."""
        for places in ([(0, 4), (1, 2)], [(0, 0), (0, 4), (1, 1), (1, 2)], [(1, 3)]):
            labels = torch.full((2, 5), -100)
            for place in places:
                labels[place] = sum(place) % 4
            same_numbers(old.run({**values, "labels": labels}), new.run({**values, "labels": labels}))

    def test_as_many_labels_as_positions_are_left_alone(self) -> None:
        left_alone(self.before, GatherLabels(max_labels=5))

    def test_classes_that_come_second_are_left_alone(self) -> None:
        """[B, C, T] with C = T: the shapes alone look like [B, T, V]."""
        text = """
            %x: f32[2, 4, 4] = batch 'x'
            %labels: i64[2, 4] = batch 'labels'
            %cross_entropy_loss: f32[] = aten.cross_entropy_loss(%x, %labels)
            return %cross_entropy_loss: f32[] = loss
        """
        left_alone(text, self.one)

    @pytest.mark.parametrize("many", [False, True], ids=["one loss per row", "two losses"])
    def test_other_losses_are_left_alone(self, many: bool) -> None:
        last = "%two: f32[] = aten.cross_entropy_loss(%view, %view_1)" if many else "%mean: f32[] = aten.mean(%loss)"
        kind, reduction = ("f32[]", 1) if many else ("f32[10]", 0)
        text = f"""
            %x: f32[2, 5, 4] = batch 'x'
            %labels: i64[2, 5] = batch 'labels'
            %view: f32[10, 4] = aten.reshape(%x, [10, 4])
            %view_1: i64[10] = aten.reshape(%labels, [10])
            %loss: {kind} = aten.cross_entropy_loss(%view, %view_1, None, {reduction})
            {last}
            %add: {kind} = aten.add(%loss, {last.partition(":")[0]})
            return %add: {kind} = loss
        """
        left_alone(text, self.one)


def unreduced(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, 4), labels.reshape(-1), reduction="none").mean()


def classes_second(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :4].transpose(1, 2), labels[:, :4])


def two(outputs: Tensor, labels: Tensor) -> Tensor:
    return token_loss(outputs, labels) + token_loss(2 * outputs, labels)


@pytest.mark.parametrize("loss", [unreduced, classes_second, two])
def test_programs_of_other_losses_agree_with_the_reference(loss) -> None:
    model, inputs = Tiny(), sequences()
    program = mz.transform(model, inputs, loss=loss)
    assert program.labels["max_labels"] is None
    mz.verify(program, model, inputs)


def test_logits_that_are_infinite_elsewhere_by_a_mask() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return token_loss(outputs.masked_fill(torch.arange(4) == 0, float("-inf")), labels)

    model, inputs = Tiny(), sequences()
    program = mz.transform(model, inputs, loss=loss)
    assert bool(mz.verify(program, model, inputs).losses.isfinite().all())
