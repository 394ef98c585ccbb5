"""The legalisation passes for each precision, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.forms.canonical_reshapes import CanonicalReshapes
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.core_forms import CoreForms
from lowering.passes.forms.expand_to_copies import ExpandToCopies
from lowering.passes.forms.flat_linears import FlatLinears
from lowering.passes.forms.merge_axes import MergeAxes
from lowering.passes.forms.normalise_dims import NormaliseDims
from lowering.passes.forms.reduce_last_axis import ReduceLastAxis
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.forms.split_to_slices import SplitToSlices
from lowering.passes.layers.bounded_norms import BoundedNorms
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.decompose_norms import DecomposeNorms
from lowering.passes.layers.gelu_to_exp import GeluToExp
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.patches_to_linear import PatchesToLinear
from lowering.passes.layers.products_to_bmm import ProductsToBmm
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.layers.weights_to_linear import WeightsToLinear
from lowering.passes.values.float_scalars import FloatScalars
from lowering.passes.values.fold_constants import FoldConstants


def _passes(mask: float, norms: tuple[LegalisationPass, ...] = ()) -> tuple[LegalisationPass, ...]:
    """`mask`: what is subtracted from scores that do not count; the delegate's floats must hold it, and what `norms`
    make of norms written out."""
    return (
        RemoveNoops(),
        FoldConstants(),
        CoreForms(),
        SplitToSlices(),
        PatchesToLinear(),
        CanonicalReshapes(),
        GroupRepeatedHeads(),
        DecomposeAttention(bias=mask),
        DecomposeNorms(),
        *norms,
        DecomposeActivations(),
        GeluToExp(),
        WeightsToLinear(),
        ProductsToBmm(),
        ScaleSmallerFactor(),
        ExpandToCopies(multiply_floats=False),
        NormaliseDims(),
        ReduceLastAxis(),
        MergeAxes(),
        FlatLinears(least_rank=4),
        FloatScalars(),
        FoldConstants(),
        CanonicalReshapes(),
        RemoveNoops(),
        CopyViews(),
    )


PASSES = {"fp32": _passes(mask=1e9), "fp16": _passes(mask=3e4, norms=(BoundedNorms(),))}
