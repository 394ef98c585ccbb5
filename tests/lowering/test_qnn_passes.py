"""QNN's own legalization passes: each fires, leaves near misses alone, keeps the numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.equalize_ranks import EqualizeRanks
from lowering.passes.forms.flatten_linears import FlattenLinears
from lowering.passes.layers.bound_masks import BoundMasks
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.fuse_norms import FuseNorms
from lowering.passes.values.convert_scalars_to_constants import ConvertScalarsToConstants
from tests.lowering.passkit import Fn, rewrite

HALF_MAX = 65504.0
X = torch.randn(9, 6, 16, generator=torch.Generator().manual_seed(0))
SCORES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "number", [lambda x: x * 2.5, lambda x: x - 3, lambda x: x / 7, lambda x: x + 1, lambda x: x.abs() ** 1.5]
)
def test_numbers_become_constants_of_the_same_rank(number):
    result = rewrite(Fn(lambda _, x: number(x)), (X,), ConvertScalarsToConstants())
    assert result.rewrites["convert-scalars-to-constants"] == 1
    (fqn,) = result.after.graph_signature.buffers
    assert result.after.state_dict[fqn].shape == (1, 1, 1)
    assert result.error == 0


def test_equal_numbers_are_one_constant():
    result = rewrite(Fn(lambda _, x: (x * 2.5) * 2.5), (X,), ConvertScalarsToConstants())
    assert result.rewrites["convert-scalars-to-constants"] == 2
    assert len(result.after.graph_signature.buffers) == 1


def test_operands_get_the_rank_of_the_result():
    model = Fn(lambda m, x: x * m.w + m.table, w=torch.randn(16), table=torch.randn(6, 1))
    result = rewrite(model, (X,), EqualizeRanks())
    assert result.rewrites["equalize-ranks"] == 2
    assert result.ops() == {"mul": 1, "add": 1, "reshape": 2}
    assert result.error == 0


@pytest.mark.parametrize("shape", [(9, 6, 16), (2, 3, 5, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_work_on_rows(shape, bias):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    result = rewrite(torch.nn.Linear(16, 5, bias=bias), (x,), FlattenLinears())
    assert result.rewrites["flatten-linears"] == 1
    linear = next(node for node in result.after.graph.nodes if "linear" in str(node.target))
    assert linear.meta["val"].dim() == 2
    assert result.error < 1e-6


class WrittenOut(torch.nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.weight = torch.nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2) if self.form == "pow" else x * x
        root = torch.rsqrt(square.mean(-1, keepdim=True) + 1e-5)
        return self.weight * (root * x if self.form == "turned" else x * root)


@pytest.mark.parametrize("form", ["pow", "product", "turned"])
def test_a_written_out_rms_norm_is_one_operator_on_rows(form):
    result = rewrite(WrittenOut(form), (X,), FuseNorms())
    assert result.rewrites["fuse-norms"] == 1
    assert result.ops() == {"rms_norm": 1, "mul": 1, "reshape": 2}
    assert result.error < 1e-6


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", [torch.nn.RMSNorm, torch.nn.LayerNorm])
def test_norms_work_on_rows_with_weights(kind, affine):
    norm = kind(16, elementwise_affine=affine)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    result = rewrite(norm, (X + 3,), FuseNorms())
    assert result.rewrites["fuse-norms"] == 1
    name = "rms_norm" if kind is torch.nn.RMSNorm else "native_layer_norm"
    node = next(node for node in result.after.graph.nodes if name in str(node.target))
    assert node.args[0].meta["val"].shape == (54, 16)
    assert None not in node.args
    assert result.error < 1e-6


CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "attention",
    [
        lambda m, s: (s + m.mask).softmax(-1),
        lambda m, s: (s + m.mask[None, None, :, :4]).softmax(-1),
        lambda m, s: s.masked_fill(m.hidden, -math.inf).softmax(-1),
        lambda m, s: s.masked_fill(m.hidden, torch.finfo(torch.float32).min).softmax(-1),
        lambda m, s: torch.where(m.hidden, -math.inf, s).softmax(-1),
    ],
    ids=["added", "added-slice", "filled-inf", "filled-min", "where"],
)
def test_masks_fit_into_halves(attention):
    least = torch.finfo(torch.float32).min
    model = Fn(attention, mask=torch.zeros(4, 4).masked_fill(CAUSAL, least), hidden=CAUSAL)
    result = rewrite(model, (SCORES,), CanonicalizeReshapes(), BoundMasks())
    assert result.rewrites["bound-masks"] >= 1
    assert result.error == 0
    numbers = [arg for node in result.after.graph.nodes for arg in node.args if isinstance(arg, float)]
    state = {**result.after.state_dict, **result.after.constants}
    floats = [state[name] for name in result.after.graph_signature.buffers if state[name].is_floating_point()]
    assert all(abs(number) < HALF_MAX for number in numbers)
    assert all(float(value.abs().max()) < HALF_MAX for value in floats)


@pytest.mark.parametrize(
    "other",
    [
        lambda m, s: s + m.mask,  # no softmax reads it
        lambda m, s: (s * m.mask.clamp(-1, 1)).softmax(-1),  # a factor, not a mask
        lambda m, s: (s + m.small).softmax(-1),
    ],
    ids=["no-softmax", "factor", "small"],
)
def test_other_numbers_are_left_alone(other):
    model = Fn(
        other, mask=torch.zeros(4, 4).masked_fill(CAUSAL, -1e9), small=torch.zeros(4, 4).masked_fill(CAUSAL, -50.0)
    )
    assert rewrite(model, (SCORES,), BoundMasks()).rewrites["bound-masks"] == 0


def test_attention_s_own_bias_fits_into_halves():
    q, mask = torch.randn(2, 3, 4, 8), (~CAUSAL)[None, None].expand(2, 1, 4, 4)
    model = Fn(lambda _, q, mask: F.scaled_dot_product_attention(q, q, q, mask))
    result = rewrite(model, (q, mask), DecomposeAttention(bias=30_000.0))
    numbers = [arg for node in result.after.graph.nodes for arg in node.args if isinstance(arg, float)]
    assert max(map(abs, numbers)) < HALF_MAX
    assert result.error < 1e-6
