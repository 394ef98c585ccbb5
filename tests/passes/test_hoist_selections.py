"""HoistSelections: select before computing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes import passes
from mobizo_passes.graph.facts import role
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, sequences, token_loss


class TestHoistSelections(PassContract):
    kind = passes.HoistSelections

    def example(self) -> Stage:
        return before(self.kind, Tiny(), (sequences()[0], rows()[1]), self.last_two_words)

    @staticmethod
    def last_two_words(outputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(outputs[:, -1][:, torch.tensor([3, 1, 0])], label.clamp(max=2))

    def test_it_fires(self) -> None:
        stage = self.example()
        after = stage.apply()
        body = [n for n in after.graph.nodes if n.op == "call_function"]
        # The last position is taken from the input itself; nothing of length 5 is computed.
        assert str(body[0].target) == "aten.select.int"
        assert all(5 not in n.meta["val"].shape for n in body)

    def test_a_weight_keeps_only_the_rows_that_are_read(self) -> None:
        class Head(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.tiny, self.head = Tiny(), nn.Linear(4, 30)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.tiny(x))

        after = before(self.kind, Head(), (sequences()[0], rows()[1]), self.last_two_words).apply()
        assert not any(role(n).name == "head.weight" for n in after.placeholders("parameter"))
        assert [3, 4] in [list(v.shape) for k, v in after.state.items() if "selected_rows" in k]

    def test_a_value_with_another_reader_is_left_alone(self) -> None:
        def body(y: Tensor) -> Tensor:
            z = y.tanh()
            return z[:, -1] + z.mean(1)

        stage = before(self.kind, Tiny(body), (sequences()[0], rows()[1]))
        assert stage.count() == 0

    def test_a_mixing_operator_is_not_crossed(self) -> None:
        stage = before(self.kind, Tiny(lambda y: y.cumsum(1)[:, -1]), (sequences()[0], rows()[1]))
        assert stage.count() == 0

    @pytest.mark.parametrize(
        "body",
        [
            lambda y: torch.relu(y)[:, -1] + torch.relu(y[:, -1]),
            lambda y: (F.layer_norm(y, (4,)) * y.square().mean(-1, keepdim=True).rsqrt())[:, 2],
            lambda y: (y * torch.arange(5.0)[:, None])[:, 1:2].squeeze(1),
            lambda y: (y * torch.arange(2.0)[:, None, None] + torch.ones(1, 5, 1))[:, torch.tensor([4, 4, 0])].sum(1),
            lambda y: torch.where(y > 0, y, -y)[:, 0],
            lambda y: y.tanh()[:, ::2].tanh()[:, -1],
        ],
    )
    def test_numbers_agree_on_more_shapes(self, body: Any) -> None:
        stage = before(self.kind, Tiny(body), (sequences()[0], rows()[1]))
        assert stage.count() > 0
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_a_selection_at_the_very_input_keeps_the_order_of_definitions(self) -> None:
        """Labelled positions, hoisted above everything, are still computed before they are read."""
        model, inputs = Tiny(), sequences()
        program = mz.transform(model, inputs, loss=token_loss)
        mz.verify(program, model, inputs)
        assert "mobizo.gather_rows(%x" in str(program)

    def test_a_boolean_mask_is_not_picked_by_a_product(self) -> None:
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
