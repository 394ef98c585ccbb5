"""Each legalization pass on its own: fires, leaves near misses alone, keeps the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_expands_to_copies import ConvertExpandsToCopies
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.lower_to_core_aten import LowerToCoreAten
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.layers.convert_means_to_linears import ConvertMeansToLinears
from lowering.passes.layers.convert_products_to_bmm import ConvertProductsToBmm
from lowering.passes.layers.decompose_norms import DecomposeNorms
from lowering.passes.values.fold_constants import FoldConstants
from lowering.passes.values.split_shared_weights import SplitSharedWeights
from tests.lowering.passkit import Fn, rewrite

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def rotary(module, x):
    angles = torch.arange(6)[:, None].float() * module.frequencies
    return x * torch.cat([angles, angles], -1).cos()


def test_equal_constants_are_stored_once():
    def twice(module, x):
        return rotary(module, rotary(module, x))

    result = rewrite(Fn(twice, frequencies=torch.rand(8)), (X,), RemoveNoops(), FoldConstants())
    assert len(result.after.graph_signature.buffers) == 1
    assert result.ops() == {"mul": 2}


def test_large_generated_values_stay_computations():
    def counters(_, seed):
        return torch.arange(3000).bitwise_xor(5) + seed

    small = rewrite(Fn(counters), (torch.tensor([3]),), FoldConstants(max_bytes=100_000))
    assert small.ops() == {"add": 1}
    large = rewrite(Fn(counters), (torch.tensor([3]),), FoldConstants(max_bytes=1000))
    assert large.rewrites["fold-constants"] == 0


def test_a_large_value_no_larger_than_its_source_is_folded():
    model = Fn(lambda m, x: x + m.table[torch.tensor([0, 2])].sum(0), table=torch.randn(4, 16))
    assert rewrite(model, (X,), FoldConstants(max_bytes=1)).rewrites["fold-constants"] == 1


def test_lower_to_core_aten():
    def forms(_, x, i):
        return x.softmax(-1).log_softmax(1), F.pad(i, (0, 1), value=-100), (i > 0) & (i < 3), torch.zeros_like(x).sum()

    result = rewrite(Fn(forms), (X, torch.arange(5)), LowerToCoreAten())
    assert set(result.ops()) == {
        "_softmax",
        "_log_softmax",
        "constant_pad_nd",
        "bitwise_and",
        "gt",
        "lt",
        "full",
        "sum",
    }
    assert result.error == 0


def test_reshapes_take_one_form():
    def forms(_, x):
        return x.unsqueeze(1).flatten(0, 1).squeeze(0).view(4, -1), x[:, -1], x.transpose(0, 1).reshape(6, -1)

    result = rewrite(Fn(forms), (X,), CanonicalizeReshapes())
    assert set(result.ops()) <= {"reshape", "slice", "transpose", "clone"}
    assert result.ops()["slice"] == 1
    assert result.error == 0


def test_axes_count_from_the_front_and_slices_end():
    def axes(_, x):
        return torch.cat([x[..., 8:], x[..., -8:]], -1).transpose(-1, -2).softmax(-1)

    result = rewrite(Fn(axes), (X,), NormalizeDims())
    text = str(result.after.graph)
    assert "9223372036854775807" not in text
    assert "], 2)" in text
    assert "aten.permute.default" in text
    assert "aten.softmax.int](args = (%permute, 2)" in text
    assert result.error == 0


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_taken_apart(affine):
    norm = torch.nn.LayerNorm(16, elementwise_affine=affine)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    result = rewrite(norm, (X + 3,), DecomposeNorms(), ConvertMeansToLinears())
    assert result.rewrites == {"decompose-norms": 1, "convert-means-to-linears": 2}
    assert "mean" not in result.ops()
    assert result.error < 1e-5


def test_rms_norm_is_taken_apart():
    result = rewrite(torch.nn.RMSNorm(16), (X,), DecomposeNorms(), ConvertMeansToLinears())
    assert result.rewrites == {"decompose-norms": 1, "convert-means-to-linears": 1}
    assert result.error < 1e-6


@pytest.mark.parametrize(
    "product",
    [F.linear, lambda x, b: x @ b.t(), lambda x, b: F.linear(x[0], b), lambda x, b: F.linear(x, b, b[:, 0])],
    ids=["linear", "matmul", "2d", "bias"],
)
def test_a_product_with_an_input_is_a_bmm(product):
    result = rewrite(Fn(lambda _, x, b: product(x, b)), (X, torch.randn(3, 16)), ConvertProductsToBmm())
    assert result.ops()["bmm"] == 1
    assert not {"linear", "mm", "matmul"} & set(result.ops())
    assert result.error < 1e-6


def copies(_, x, i):
    return x[None].expand(3, 2, 6, 16).reshape(6, 6, 16), i[None].expand(3, 4).reshape(12)


def test_copies_without_expand():
    result = rewrite(Fn(copies), (X, torch.arange(4)), ConvertExpandsToCopies())
    assert "expand" not in result.ops()
    assert result.ops()["cat"] == 1
    assert result.ops()["mul"] == 1
    assert result.error == 0
    portable = rewrite(Fn(copies), (X, torch.arange(4)), ConvertExpandsToCopies(multiply_floats=False))
    assert portable.ops()["cat"] == 2


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_tensor_concatenated_with_itself_is_multiplied(dim):
    def repeated(_, x, i):
        return torch.cat([x] * 3, dim), torch.cat([i] * 3)

    result = rewrite(Fn(repeated), (X, torch.arange(4)), ConvertExpandsToCopies())
    assert result.ops()["cat"] == 1
    assert result.ops()["mul"] == 1
    assert result.error == 0


def test_copies_of_infinities_are_exact():
    x = torch.tensor([[torch.inf, -torch.inf, -0.0, 1e-42]])
    result = rewrite(Fn(lambda _, x: x.expand(3, 4).reshape(12) + 0), (x,), ConvertExpandsToCopies())
    assert torch.equal(result.after.module()(x), x.repeat(3, 1).reshape(12))


def test_two_axes_at_once_and_many_copies_are_left_alone():
    x = torch.randn(1, 1, 4)
    result = rewrite(Fn(lambda _, x: x.expand(2, 3, 4).reshape(24)), (x,), ConvertExpandsToCopies())
    assert result.rewrites["convert-expands-to-copies"] == 0
    result = rewrite(Fn(lambda _, x: x.expand(9, 1, 4).reshape(36)), (x,), ConvertExpandsToCopies(max_copies=8))
    assert result.rewrites["convert-expands-to-copies"] == 0


def test_views_become_copies_and_leave_no_clone():
    def heads(_, x):
        return x.view(2, 6, 4, 4).transpose(1, 2).reshape(2, 24, 4)[:, 1:]

    result = rewrite(Fn(heads), (X,), CanonicalizeReshapes(), NormalizeDims(), RemoveNoops(), CopyViews())
    assert set(result.ops()) <= {"view_copy", "permute_copy", "slice_copy", "clone"}
    assert result.error == 0


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 16)

    def forward(self, ids, x):
        return self.table(ids), F.linear(x, self.table.weight)


def test_a_tied_weight_is_split_over_one_tensor():
    model = Tied()
    result = rewrite(model, (torch.tensor([1, 2]), X), SplitSharedWeights())
    assert result.rewrites["split-shared-weights"] == 1
    assert len({value.data_ptr() for value in result.after.state_dict.values()}) == 1
    kept = rewrite(model, (torch.tensor([1, 2]), X), SplitSharedWeights(frozenset({"table.weight"})))
    assert kept.rewrites["split-shared-weights"] == 0
