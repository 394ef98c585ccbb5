"""Attention: grouped heads, masks, rows that may attend to nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from tests.lowering.passkit import Fn, rewrite


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    n, g, t, d = x.shape
    return x[:, :, None].expand(n, g, times, t, d).reshape(n, g * times, t, d)


def qkv(n=2, heads=6, groups=2, t=5, s=7, d=4, e=4):
    torch.manual_seed(0)
    return torch.randn(n, heads, t, d), torch.randn(n, groups, s, d), torch.randn(n, groups, s, e)


def test_repeated_heads_are_grouped():
    model = Fn(lambda _, q, k, v: F.scaled_dot_product_attention(q, repeat_kv(k, 3), repeat_kv(v, 3)))
    result = rewrite(model, qkv(), CanonicalizeReshapes(), GroupRepeatedHeads())
    assert result.rewrites["group-repeated-heads"] == 1
    assert "expand" not in result.ops()
    assert result.error < 1e-6


def test_heads_tiled_instead_of_repeated_are_left_alone():
    def tiled(_, q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))

    result = rewrite(Fn(tiled), qkv(), CanonicalizeReshapes(), GroupRepeatedHeads())
    assert result.rewrites["group-repeated-heads"] == 0


def test_only_values_repeated_is_left_alone():
    def uneven(_, q, k, v):
        return F.scaled_dot_product_attention(q, k, repeat_kv(v, 3))

    q, _, v = qkv()
    result = rewrite(Fn(uneven), (q, torch.randn(2, 6, 7, 4), v), CanonicalizeReshapes(), GroupRepeatedHeads())
    assert result.rewrites["group-repeated-heads"] == 0


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    t=st.integers(1, 5),
    s=st.integers(2, 6),
    e=st.integers(1, 4),
    mask=st.sampled_from(["none", "bool", "float", "infinite", "minimum", "2d"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_decomposed_attention_is_attention(heads, t, s, e, mask, scale):
    q, k, v = qkv(2, heads[0], heads[1], t, s, 4, e)
    torch.manual_seed(t * s + e)
    allowed = torch.rand(2, 1, t, s) > 0.5
    masks = {
        "none": (),
        "bool": (allowed,),
        "float": (torch.randn(2, 1, t, s),),
        "infinite": (torch.zeros(2, 1, t, s).masked_fill(~allowed, -torch.inf),),
        "minimum": (torch.zeros(2, 1, t, s).masked_fill(~(allowed | (torch.arange(s) == 0)), torch.finfo().min),),
        "2d": (torch.rand(t, s) > 0.3,),
    }

    def attend(_, q, k, v, *m):
        return F.scaled_dot_product_attention(q, k, v, *m, scale=scale, enable_gqa=heads[0] != heads[1])

    result = rewrite(Fn(attend), (q, k, v, *masks[mask]), DecomposeAttention())
    assert result.rewrites["decompose-attention"] == 1
    assert result.ops()["bmm"] == 2
    assert result.error < 1e-5


def test_a_row_that_may_attend_to_nothing_gives_zero():
    q, k, v = qkv(groups=6)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    model = Fn(lambda _, q, k, v, m: F.scaled_dot_product_attention(q, k, v, m))
    result = rewrite(model, (q, k, v, mask), DecomposeAttention())
    out = result.after.module()(q, k, v, mask)
    assert torch.equal(out[0, :, 2], torch.zeros(6, 4))
    assert bool((out[0, :, 1] != 0).any())
    assert result.error < 1e-6


def test_the_mask_is_prepared_once_for_all_layers():
    def two(_, q, k, v, m):
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v, m), k, v, m)

    mask = torch.rand(2, 1, 5, 7) > 0.3
    result = rewrite(Fn(two), (*qkv(groups=6), mask), DecomposeAttention())
    assert result.rewrites["decompose-attention"] == 2
    assert result.ops()["any"] == 1
    assert result.ops()["sub"] == 1


def test_a_causal_flag_becomes_one_constant_without_row_factors():
    def causal(_, q, k, v):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(y, k, v, is_causal=True)

    q, k, v = qkv(groups=6, t=5, s=5)
    result = rewrite(Fn(causal), (q, k, v), DecomposeAttention())
    assert result.error < 1e-6
    assert "any" not in result.ops()
    added = [n.args[1] for n in result.after.graph.nodes if str(n.target) == "aten.add.Tensor"]
    assert len(added) == 2
    assert added[0] is added[1]


def test_a_constant_mask_without_empty_rows_needs_no_row_factors():
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    model = Fn(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.mask), mask=mask)
    assert "any" not in rewrite(model, qkv(groups=6), DecomposeAttention()).ops()
    mask = mask.clone()
    mask[3] = False
    model = Fn(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, m.mask), mask=mask)
    result = rewrite(model, qkv(groups=6), DecomposeAttention())
    assert result.ops()["any"] == 1
    assert result.error < 1e-6


@pytest.mark.parametrize("rank", [2, 3])
def test_attention_that_is_not_four_dimensional_is_left_alone(rank):
    x = torch.randn(*((2,) * (rank - 2)), 5, 4)
    result = rewrite(Fn(lambda _, x: F.scaled_dot_product_attention(x, x, x)), (x,), DecomposeAttention())
    assert result.rewrites["decompose-attention"] == 0
