"""The passes that Vulkan needs: each fires, leaves near misses alone and keeps the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_splits_to_slices import ConvertSplitsToSlices
from lowering.passes.forms.flatten_linears import FlattenLinears
from lowering.passes.forms.merge_axes import MergeAxes
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.reduce_last_axis import ReduceLastAxis
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.layers.convert_erf_to_exp import ConvertErfToExp
from lowering.passes.layers.convert_gelu_to_exp import ConvertGeluToExp
from lowering.passes.layers.convert_patches_to_linears import ConvertPatchesToLinears
from lowering.passes.layers.convert_weights_to_linears import ConvertWeightsToLinears
from lowering.passes.values.fold_constants import FoldConstants
from tests.lowering.passkit import Fn, rewrite

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def highest_rank(program: Any) -> int:
    return max(n.meta["val"].dim() for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))


@pytest.mark.parametrize(
    "split",
    [
        lambda x: x.split(5, dim=-1)[1:],
        lambda x: torch.split(x, [1, 3, 12], dim=2),
        lambda x: x.chunk(3, dim=1),
        lambda x: x.unbind(1)[::2],
    ],
)
def test_convert_splits_to_slices(split):
    result = rewrite(Fn(lambda _, x: tuple(piece + 1.0 for piece in split(x))), (X,), ConvertSplitsToSlices())
    assert result.rewrites["convert-splits-to-slices"] == 1
    assert set(result.ops()) <= {"slice", "reshape", "add"}
    assert result.error == 0


def test_convert_gelu_to_exp():
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 1e-20, -1e4, 1e4])])
    result = rewrite(Fn(lambda _, x: F.gelu(x)), (x,), ConvertGeluToExp())
    assert result.ops()["gelu"] == 0
    found, exact = result.after.module()(x), F.gelu(x.double())
    assert float(((found - exact) / x.abs().clamp_min(1.0)).abs().max()) < 3e-7


# With `ratio`, erf(x) · 1e-4 / (x + 1e-4), which is below 2/√π · 1e-4.
@pytest.mark.parametrize(("ratio", "tolerance"), [(False, 4e-7), (True, 1.14e-4)])
def test_convert_erf_to_exp(ratio: bool, tolerance: float):
    x = torch.cat([torch.linspace(-6, 6, 2001), torch.tensor([0.0, -0.0, 1e-20, 1e-7, -1e-5, -1e4, 1e4])])
    result = rewrite(Fn(lambda _, x: torch.erf(x)), (x,), ConvertErfToExp(ratio))
    assert result.ops()["erf"] == 0
    assert float((result.after.module()(x) - torch.erf(x.double())).abs().max()) < tolerance


class Patches(torch.nn.Module):
    def __init__(self, kernel: tuple[int, int] = (4, 2), **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, kernel, **{"stride": kernel, **options})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@pytest.mark.parametrize("bias", [True, False])
def test_convert_patches_to_linears(bias):
    result = rewrite(Patches(bias=bias), (torch.randn(2, 3, 8, 6),), ConvertPatchesToLinears())
    assert result.rewrites["convert-patches-to-linears"] == 1
    assert highest_rank(result.after) == 4
    assert result.ops()["linear"] == 1
    assert result.error < 1e-6


@pytest.mark.parametrize(
    "product", [lambda m, x: torch.addmm(m.b, x[0], m.w), lambda m, x: x[0].mm(m.w), lambda m, x: x @ m.w]
)
def test_convert_weights_to_linears(product):
    result = rewrite(
        Fn(product, w=torch.randn(16, 5), b=torch.randn(5)),
        (X,),
        CanonicalizeReshapes(),
        ConvertWeightsToLinears(),
        FoldConstants(),
    )
    assert result.rewrites["convert-weights-to-linears"] == 1
    assert result.ops()["linear"] == 1
    assert not {"addmm", "mm", "matmul", "permute"} & set(result.ops())
    (linear,) = (node for node in result.after.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert all(isinstance(operand, torch.fx.Node) for operand in linear.args)  # no bias is no argument, not None
    assert result.error < 1e-6


@pytest.mark.parametrize(
    "pool", [lambda x: x.mean(1), lambda x: x.sum(0, keepdim=True), lambda x: x.mean((0, 1), keepdim=True)]
)
def test_reduce_last_axis(pool):
    model = Fn(lambda m, x: F.linear(pool(x), m.w), w=torch.randn(3, 16))
    result = rewrite(model, (X,), ReduceLastAxis())
    assert result.rewrites["reduce-last-axis"] == 1
    reductions = [n for n in result.after.graph.nodes if str(n.target) in ("aten.mean.dim", "aten.sum.dim_IntList")]
    assert [n.args[1] for n in reductions] == [[-1]]
    assert result.error < 1e-6


@pytest.mark.parametrize(
    "model",
    [
        Fn(lambda _, x: x.mean(1)),  # no product follows
        Fn(lambda m, x: F.linear(x.mean(-1), m.w), w=torch.randn(3, 6)),
        Fn(lambda m, x: F.linear(m.w * x.sum((0, 1, 2)), m.w), w=torch.randn(3, 3)),
    ],
)
def test_reductions_that_may_stay_do(model):
    assert rewrite(model, (X,), ReduceLastAxis()).rewrites["reduce-last-axis"] == 0


def fused(_, x):
    y = x.view(2, 3, 2, 2, 4, 2).permute(2, 0, 3, 1, 4, 5)  # [B,T,two,H,d,e] -> [two,B,H,T,d,e]
    return torch.cat([y[0], y[1] * 2.0], dim=-2).reshape(2, 2, 3, 16)


def test_merge_axes():
    passes = (ConvertSplitsToSlices(), CanonicalizeReshapes(), NormalizeDims(), MergeAxes(), CanonicalizeReshapes())
    result = rewrite(Fn(fused), (X.reshape(2, 3, 32),), *passes)
    assert result.rewrites["merge-axes"] >= 3
    assert highest_rank(result.after) <= 4
    assert result.error == 0


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 3, 1, 4), (1, 0, 2, 3, 4), (0, 1, 4, 3, 2)])
def test_permutations_of_five_axes(order):
    x = torch.randn(2, 3, 2, 3, 2)
    five = Fn(lambda _, x: x.reshape(2, 3, 2, 3, 2).permute(order).reshape(6, 12))
    result = rewrite(
        five, (x.reshape(6, 12),), RemoveNoops(), CanonicalizeReshapes(), MergeAxes(), CanonicalizeReshapes()
    )
    assert result.rewrites["merge-axes"] == 1
    assert highest_rank(result.after) <= 4
    assert result.error == 0


def test_look_ups_along_a_negative_axis_get_a_positive_one():
    index = torch.zeros(2, 6, 1, dtype=torch.long)
    model = Fn(lambda _, x, i: torch.gather(x, -1, i) + torch.index_select(x, -3, i[0, 0]).sum())
    result = rewrite(model, (X, index), NormalizeDims())
    kinds = (torch.ops.aten.gather.default, torch.ops.aten.index_select.default)
    axes = [[n.args[1] for n in each.graph.nodes if n.target in kinds] for each in (result.before, result.after)]
    assert axes == [[-1, -3], [2, 0]]
    assert result.error == 0


def test_linears_of_four_axes_work_on_rows():
    result = rewrite(torch.nn.Linear(4, 5), (torch.rand(2, 3, 6, 4),), FlattenLinears(least_rank=4))
    assert result.rewrites["flatten-linears"] == 1
    assert result.error < 1e-6
    (linear,) = result.after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert linear.meta["val"].shape == (36, 5)
    assert (
        rewrite(torch.nn.Linear(4, 5), (torch.rand(3, 6, 4),), FlattenLinears(least_rank=4)).rewrites["flatten-linears"]
        == 0
    )
