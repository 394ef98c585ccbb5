"""Pass canonicalize-products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobizo_passes import passes
from tests.models import random, seeded
from tests.passes.contract import PassContract, Stage, Tiny, before, rows, sequences, targets, token_loss


class WithMatrix(Tiny):
    """Tiny, with stored matrices [4, 4], [4, 1] and [1, 4] for its body."""

    def __init__(self, body) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(4, 4))
        self.column, self.column_t = nn.Parameter(torch.empty(4, 1)), nn.Parameter(torch.empty(1, 4))
        self.spelled = body

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled(self, super().forward(x))


def products(stage: Stage) -> list[str]:
    names = ("matmul", "mm", "bmm", "addmm")
    return [t for t in targets(stage.apply()) if t.split(".")[1] in names]


class TestCanonicalProducts(PassContract):
    kind = passes.CanonicalizeProducts

    def stage(self, body) -> Stage:
        return before(self.kind, WithMatrix(body), sequences(), token_loss)

    def example(self) -> Stage:
        return self.stage(lambda m, y: torch.einsum("bto,op->btp", y, m.matrix))

    def test_it_fires(self) -> None:
        stage = self.example()
        assert stage.count() >= 1
        assert products(stage) == ["aten.matmul.default"]

    def test_values_from_the_right(self) -> None:
        stage = self.stage(lambda m, y: (m.matrix @ y.transpose(1, 2)).transpose(1, 2))
        assert stage.count() == 1
        (product,) = [n for n in stage.apply().graph.nodes if str(n.target) == "aten.matmul.default"]
        assert product.args[1].target is torch.ops.aten.permute.default
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_a_scaled_sum(self) -> None:
        model = WithMatrix(lambda m, y: torch.addmm(y, y, m.matrix, beta=0.5, alpha=2))
        stage = before(self.kind, model, rows())
        assert stage.count() == 1
        assert products(stage) == ["aten.matmul.default"]
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    @pytest.mark.parametrize("equation", ["btr,or->bto", "btr,ro->bto", "tbr,or->bto", "btr,or->tbo"])
    def test_an_outer_product_of_rank_one(self, equation: str) -> None:
        """einsum multiplies element-wise where the summed dimension is one."""

        def body(m: WithMatrix, y: Tensor) -> Tensor:
            turned = y.transpose(0, 1) if equation.startswith("tb") else y
            out = torch.einsum(equation, turned[..., 1:2], m.column if ",or" in equation else m.column_t)
            return out.transpose(0, 1) if equation.endswith("tbo") else out

        stage = self.stage(body)
        assert products(stage) == ["aten.matmul.default"]
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_an_outer_product_the_other_way_round_is_left_alone(self) -> None:
        stage = self.stage(lambda m, y: torch.einsum("btr,or->obt", y[..., 1:2], m.column).permute(1, 2, 0))
        assert products(stage) == []
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def test_a_product_of_two_computed_values_is_left_alone(self) -> None:
        stage = self.stage(lambda m, y: torch.bmm(y @ m.matrix, y.transpose(1, 2)) @ y)
        assert stage.count() == 0

    def test_rows_that_others_read_stay_rows(self) -> None:
        def body(m: WithMatrix, y: Tensor) -> Tensor:
            rows = y.reshape(-1, 4) @ m.matrix
            return rows.reshape(2, 5, 4) + rows.mean()

        assert self.stage(body).count() == 0


def test_seeded_matrix_is_not_symmetric() -> None:
    """A symmetric matrix would hide a lost transposition."""
    matrix = seeded(WithMatrix(lambda m, y: y)).get_parameter("matrix")
    assert not torch.allclose(matrix, matrix.T)
    assert random(2, 3).shape == (2, 3)
