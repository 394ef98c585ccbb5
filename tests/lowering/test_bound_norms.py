"""Norms for half precision: the same numbers, and none that a half cannot hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowering.passes.layers.bound_norms import BoundNorms
from lowering.passes.layers.decompose_norms import DecomposeNorms
from tests.lowering.passkit import Fn, rewrite

X = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(48, generator=torch.Generator().manual_seed(1))


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def bounded(result: Any) -> int:
    return result.rewrites["bound-norms"]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_norm_written_out_keeps_its_numbers(scale: float):
    result = rewrite(Fn(lambda m, x: rms(x) * m.w, w=WEIGHT), (X * scale,), BoundNorms())
    assert bounded(result) == 1
    # Two more roundings of float32, and 1e-4 beside a row's mean size in a term that vanishes beside the others.
    assert result.error < 1e-5
    assert "pow" not in result.ops()


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm(48), torch.nn.LayerNorm(48)])
def test_norms_taken_apart_before_are_bounded_too(norm: torch.nn.Module):
    result = rewrite(norm, (X + 3,), DecomposeNorms(), BoundNorms())
    assert bounded(result) == 1
    assert result.error < 1e-5


def test_a_root_that_scales_a_tangent_is_bounded_too():
    def tangent(_: Any, x: Tensor) -> Tensor:
        return x.flip(0) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    result = rewrite(Fn(tangent), (X,), BoundNorms())
    assert bounded(result) == 1
    assert result.error < 1e-5


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),  # over another axis
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),  # a sum
        lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5),  # of another power
    ],
)
def test_other_products_are_left_alone(norm: Any):
    assert bounded(rewrite(Fn(lambda _, x: norm(x)), (X,), BoundNorms())) == 0


@pytest.mark.parametrize("largest", [1.0, 300.0, 24_000.0])
def test_in_halves_large_rows_are_what_they_are_in_floats(largest: float):
    """One element of each row as language models have it, the others fifty at most."""
    x = torch.randn(6, 576, generator=torch.Generator().manual_seed(2)) * min(largest, 50.0)
    x[:, 7] = largest
    exact = rms(x.half().double())
    result = rewrite(Fn(lambda _, x: rms(x)), (x,), BoundNorms())
    found = in_halves(result.after, x)
    # A half has 11 bits; each of some eight roundings is an error of up to 2 ** -11.
    assert float((found - exact).abs().max() / exact.abs().max()) < 8 * 2**-11
    if largest > 256:
        assert not torch.allclose(in_halves(result.before, x), exact, rtol=0.5)


@pytest.mark.parametrize("row", [torch.zeros(1, 48), torch.full((1, 48), 1e-6)])
def test_rows_of_nothing_stay_small_and_finite(row: Tensor):
    result = rewrite(Fn(lambda _, x: rms(x)), (row + 0.0,), BoundNorms())
    assert float(in_halves(result.after, row).abs().max()) < 1e-2


def in_halves(program: Any, x: Tensor) -> Tensor:
    """Run a graph with every value rounded to a half."""

    class Rounded(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            return value.half().float() if isinstance(value, Tensor) and value.is_floating_point() else value

    held = [program.state_dict[name] for name in program.graph_signature.inputs_to_buffers.values()]
    (found,) = Rounded(program.graph_module).run(*held, x)
    return found.double()
