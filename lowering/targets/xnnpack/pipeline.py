"""The legalization passes, in the order in which they run."""

from __future__ import annotations

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_expands_to_copies import ConvertExpandsToCopies
from lowering.passes.forms.convert_splits_to_slices import ConvertSplitsToSlices
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.lower_to_core_aten import LowerToCoreAten
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.layers.bound_masks import BoundMasks
from lowering.passes.layers.bound_norms import BoundNorms
from lowering.passes.layers.convert_erf_to_exp import ConvertErfToExp
from lowering.passes.layers.convert_gelu_to_exp import ConvertGeluToExp
from lowering.passes.layers.convert_means_to_linears import ConvertMeansToLinears
from lowering.passes.layers.convert_products_to_bmm import ConvertProductsToBmm
from lowering.passes.layers.convert_weights_to_linears import ConvertWeightsToLinears
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.decompose_norms import DecomposeNorms
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.values.convert_scalars_to_float import ConvertScalarsToFloat
from lowering.passes.values.fold_constants import FoldConstants
from lowering.passes.values.narrow_body import NarrowBody
from mobizo_passes.graph.passes import Pass


def _passes(
    attention: DecomposeAttention, norms: tuple[Pass, ...] = (), gelu: tuple[Pass, ...] = ()
) -> tuple[Pass, ...]:
    return (
        RemoveNoops(),
        FoldConstants(),
        LowerToCoreAten(),
        ConvertSplitsToSlices(),
        CanonicalizeReshapes(),
        GroupRepeatedHeads(),
        attention,
        DecomposeNorms(),
        *norms,
        ConvertMeansToLinears(),
        DecomposeActivations(),
        ConvertErfToExp(),
        *gelu,
        ConvertWeightsToLinears(keep_shared=True),
        ConvertProductsToBmm(),
        ScaleSmallerFactor(),
        ConvertExpandsToCopies(),
        NormalizeDims(),
        ConvertScalarsToFloat(),
        FoldConstants(),
        CanonicalizeReshapes(),
        RemoveNoops(),
        CopyViews(),
    )


# A mask is what a half holds. XNNPACK has no GELU in halves.
PASSES = {
    "fp32": _passes(DecomposeAttention()),
    "fp16": (
        *_passes(DecomposeAttention(bias=3e4), (BoundMasks(3e4), BoundNorms()), (ConvertGeluToExp(),)),
        NarrowBody(),
    ),
}
