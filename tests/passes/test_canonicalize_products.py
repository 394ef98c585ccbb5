"""CanonicalizeProducts: products with stored matrices in one spelling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobizo_passes.passes import CanonicalizeProducts
from tests.passes.contract import PassContract, Tiny, before, left_alone, rewritten, sequences, targets, token_loss


class WithMatrix(Tiny):
    """Tiny, with stored matrices [4, 1] and [1, 4] for its body."""

    def __init__(self, body) -> None:
        super().__init__()
        self.column, self.column_t = nn.Parameter(torch.empty(4, 1)), nn.Parameter(torch.empty(1, 4))
        self.spelled = body

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled(self, super().forward(x))


class TestCanonicalizeProducts(PassContract):
    one = CanonicalizeProducts()
    # What einsum("bto,op->btp") consists of.
    before = """
        %matrix: f32[4, 4] = parameter 'matrix'
        %y: f32[2, 5, 4] = batch 'y'

        %reshape: f32[1, 10, 4] = aten.reshape(%y, [1, 10, 4])
        %reshape_1: f32[1, 4, 4] = aten.reshape(%matrix, [1, 4, 4])
        %bmm: f32[1, 10, 4] = aten.bmm(%reshape, %reshape_1)
        %reshape_2: f32[2, 5, 4] = aten.reshape(%bmm, [2, 5, 4])

        return %reshape_2: f32[2, 5, 4] = logits
    """
    after = """
        %matrix: f32[4, 4] = parameter 'matrix'
        %y: f32[2, 5, 4] = batch 'y'

        %matmul_1: f32[2, 5, 4] = aten.matmul(%y, %matrix)  # | canonicalize-products

        return %matmul_1: f32[2, 5, 4] = logits
    """

    def test_values_from_the_right(self) -> None:
        text = """
            %matrix: f32[4, 4] = parameter 'matrix'
            %y: f32[2, 5, 4] = batch 'y'
            %transpose: f32[2, 4, 5] = aten.transpose(%y, 1, 2)
            %matmul: f32[2, 4, 5] = aten.matmul(%matrix, %transpose)
            return %matmul: f32[2, 4, 5] = logits
        """
        assert rewritten(text, self.one)[2:-1] == [
            "%permute: f32[4, 4] = aten.permute(%matrix, [1, 0])  # | canonicalize-products",
            "%matmul_1: f32[2, 5, 4] = aten.matmul(%y, %permute)  # | canonicalize-products",
            "%transpose_1: f32[2, 4, 5] = aten.transpose(%matmul_1, -2, -1)  # | canonicalize-products",
        ]

    def test_a_scaled_sum(self) -> None:
        text = """
            %matrix: f32[4, 4] = parameter 'matrix'
            %y: f32[2, 4] = batch 'y'
            %addmm: f32[2, 4] = aten.addmm(%y, %y, %matrix, beta=0.5, alpha=2)
            return %addmm: f32[2, 4] = logits
        """
        assert rewritten(text, self.one)[2:-1] == [
            "%matmul: f32[2, 4] = aten.matmul(%y, %matrix)  # | canonicalize-products",
            "%mul: f32[2, 4] = aten.mul(%matmul, 2)  # | canonicalize-products",
            "%mul_1: f32[2, 4] = aten.mul(%y, 0.5)  # | canonicalize-products",
            "%add: f32[2, 4] = aten.add(%mul_1, %mul)  # | canonicalize-products",
        ]

    @pytest.mark.parametrize("equation", ["btr,or->bto", "btr,ro->bto", "tbr,or->bto", "btr,or->tbo"])
    def test_an_outer_product_of_rank_one(self, equation: str) -> None:
        """einsum multiplies element-wise where the summed dimension is one."""

        def body(m: WithMatrix, y: Tensor) -> Tensor:
            turned = y.transpose(0, 1) if equation.startswith("tb") else y
            out = torch.einsum(equation, turned[..., 1:2], m.column if ",or" in equation else m.column_t)
            return out.transpose(0, 1) if equation.endswith("tbo") else out

        stage = before(CanonicalizeProducts, WithMatrix(body), sequences(), token_loss)
        after = targets(stage.apply())
        assert "aten.matmul.default" in after
        assert not {"aten.mm.default", "aten.bmm.default"} & set(after)
        stage.check_numbers()

    def test_an_outer_product_the_other_way_round_is_left_alone(self) -> None:
        text = """
            %column: f32[4, 1] = parameter 'column'
            %y: f32[2, 5, 1] = batch 'y'
            %permute: f32[1, 2, 5] = aten.permute(%y, [2, 0, 1])
            %reshape: f32[4, 1, 1] = aten.reshape(%column, [4, 1, 1])
            %mul: f32[4, 2, 5] = aten.mul(%reshape, %permute)
            return %mul: f32[4, 2, 5] = logits
        """
        left_alone(text, self.one)

    def test_a_product_of_two_computed_values_is_left_alone(self) -> None:
        text = """
            %y: f32[2, 5, 4] = batch 'y'
            %transpose: f32[2, 4, 5] = aten.transpose(%y, 1, 2)
            %bmm: f32[2, 5, 5] = aten.bmm(%y, %transpose)
            return %bmm: f32[2, 5, 5] = logits
        """
        left_alone(text, self.one)

    def test_rows_that_others_read_stay_rows(self) -> None:
        text = """
            %matrix: f32[4, 4] = parameter 'matrix'
            %y: f32[2, 5, 4] = batch 'y'
            %reshape: f32[10, 4] = aten.reshape(%y, [10, 4])
            %mm: f32[10, 4] = aten.matmul(%reshape, %matrix)
            %reshape_1: f32[2, 5, 4] = aten.reshape(%mm, [2, 5, 4])
            %mean: f32[] = aten.mean(%mm)
            %add: f32[2, 5, 4] = aten.add(%reshape_1, %mean)
            return %add: f32[2, 5, 4] = logits
        """
        left_alone(text, self.one)
