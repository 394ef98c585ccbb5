"""The legalization passes for each precision, in the order in which they run."""

from __future__ import annotations

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_expands_to_copies import ConvertExpandsToCopies
from lowering.passes.forms.convert_splits_to_slices import ConvertSplitsToSlices
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.equalize_ranks import EqualizeRanks
from lowering.passes.forms.flatten_linears import FlattenLinears
from lowering.passes.forms.lower_to_core_aten import LowerToCoreAten
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.layers.bound_masks import BoundMasks
from lowering.passes.layers.convert_erf_to_exp import ConvertErfToExp
from lowering.passes.layers.convert_patches_to_linears import ConvertPatchesToLinears
from lowering.passes.layers.convert_products_to_bmm import ConvertProductsToBmm
from lowering.passes.layers.convert_rsqrt_to_sqrt import ConvertRsqrtToSqrt
from lowering.passes.layers.convert_weights_to_linears import ConvertWeightsToLinears
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.fuse_norms import FuseNorms
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.values.convert_scalars_to_constants import ConvertScalarsToConstants
from lowering.passes.values.convert_scalars_to_float import ConvertScalarsToFloat
from lowering.passes.values.fold_constants import FoldConstants
from mobizo_passes.graph.passes import Pass


def _passes(mask: float, integers: bool = False) -> tuple[Pass, ...]:
    """Numbers beyond half's range are finite here, and everything that QNN aligns by rank has the same rank.

    The quantizer takes no reciprocal roots outside of norms.
    """
    return (
        RemoveNoops(),
        FoldConstants(),
        LowerToCoreAten(),
        ConvertSplitsToSlices(),
        ConvertPatchesToLinears(),
        CanonicalizeReshapes(),
        GroupRepeatedHeads(),
        DecomposeAttention(bias=mask),
        BoundMasks(mask),
        FuseNorms(),
        *((ConvertRsqrtToSqrt(),) if integers else ()),
        DecomposeActivations(),
        ConvertErfToExp(ratio=integers),
        ConvertWeightsToLinears(),
        ConvertProductsToBmm(),
        ScaleSmallerFactor(),
        ConvertExpandsToCopies(),
        NormalizeDims(),
        ConvertScalarsToFloat(),
        FlattenLinears(),
        ConvertScalarsToConstants(),
        EqualizeRanks(),
        FoldConstants(),
        CanonicalizeReshapes(),
        RemoveNoops(),
    )


# A mask shares its integers with the scores: the larger it is, the coarser they become. For integers `CopyViews` comes
# after the quantization, whose tools know only the operators before it.
PASSES = {
    "fp16": (*_passes(mask=3e4), CopyViews()),
    "16a8w": _passes(mask=64.0, integers=True),
    "8a8w": _passes(mask=20.0, integers=True),
}
