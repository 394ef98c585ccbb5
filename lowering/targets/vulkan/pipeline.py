"""The legalization passes for each precision, in the order in which they run."""

from __future__ import annotations

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_expands_to_copies import ConvertExpandsToCopies
from lowering.passes.forms.convert_splits_to_slices import ConvertSplitsToSlices
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.flatten_linears import FlattenLinears
from lowering.passes.forms.lower_to_core_aten import LowerToCoreAten
from lowering.passes.forms.merge_axes import MergeAxes
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.reduce_last_axis import ReduceLastAxis
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.layers.bound_norms import BoundNorms
from lowering.passes.layers.convert_erf_to_exp import ConvertErfToExp
from lowering.passes.layers.convert_gelu_to_exp import ConvertGeluToExp
from lowering.passes.layers.convert_patches_to_linears import ConvertPatchesToLinears
from lowering.passes.layers.convert_products_to_bmm import ConvertProductsToBmm
from lowering.passes.layers.convert_weights_to_linears import ConvertWeightsToLinears
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.decompose_norms import DecomposeNorms
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.values.convert_scalars_to_float import ConvertScalarsToFloat
from lowering.passes.values.fold_constants import FoldConstants
from mobizo_passes.graph.passes import Pass


def _passes(mask: float, norms: tuple[Pass, ...] = ()) -> tuple[Pass, ...]:
    """`mask`: what is subtracted from scores that do not count; the delegate's floats must hold it, and what `norms`
    make of norms written out."""
    return (
        RemoveNoops(),
        FoldConstants(),
        LowerToCoreAten(),
        ConvertSplitsToSlices(),
        ConvertPatchesToLinears(),
        CanonicalizeReshapes(),
        GroupRepeatedHeads(),
        DecomposeAttention(bias=mask),
        DecomposeNorms(),
        *norms,
        DecomposeActivations(),
        ConvertErfToExp(),
        ConvertGeluToExp(),
        ConvertWeightsToLinears(),
        ConvertProductsToBmm(),
        ScaleSmallerFactor(),
        ConvertExpandsToCopies(multiply_floats=False),
        NormalizeDims(),
        ReduceLastAxis(),
        MergeAxes(),
        FlattenLinears(least_rank=4),
        ConvertScalarsToFloat(),
        FoldConstants(),
        CanonicalizeReshapes(),
        RemoveNoops(),
        CopyViews(),
    )


PASSES = {"fp32": _passes(mask=1e9), "fp16": _passes(mask=3e4, norms=(BoundNorms(),))}
