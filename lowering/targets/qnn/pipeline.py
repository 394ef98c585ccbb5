"""The legalisation passes for each precision, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.forms.canonical_reshapes import CanonicalReshapes
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.core_forms import CoreForms
from lowering.passes.forms.equal_ranks import EqualRanks
from lowering.passes.forms.expand_to_copies import ExpandToCopies
from lowering.passes.forms.flat_linears import FlatLinears
from lowering.passes.forms.normalise_dims import NormaliseDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.forms.split_to_slices import SplitToSlices
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.finite_masks import FiniteMasks
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.patches_to_linear import PatchesToLinear
from lowering.passes.layers.products_to_bmm import ProductsToBmm
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.layers.weights_to_linear import WeightsToLinear
from lowering.passes.layers.whole_norms import WholeNorms
from lowering.passes.values.float_scalars import FloatScalars
from lowering.passes.values.fold_constants import FoldConstants
from lowering.passes.values.scalars_to_constants import ScalarsToConstants


def _passes(mask: float) -> tuple[LegalisationPass, ...]:
    """Numbers beyond half's range are finite here, and everything that QNN aligns by rank has the same rank."""
    return (
        RemoveNoops(),
        FoldConstants(),
        CoreForms(),
        SplitToSlices(),
        PatchesToLinear(),
        CanonicalReshapes(),
        GroupRepeatedHeads(),
        DecomposeAttention(bias=mask),
        FiniteMasks(mask),
        WholeNorms(),
        DecomposeActivations(),
        WeightsToLinear(),
        ProductsToBmm(),
        ScaleSmallerFactor(),
        ExpandToCopies(),
        NormaliseDims(),
        FloatScalars(),
        FlatLinears(),
        ScalarsToConstants(),
        EqualRanks(),
        FoldConstants(),
        CanonicalReshapes(),
        RemoveNoops(),
    )


# A mask shares its integers with the scores: the larger it is, the coarser they become. For integers `CopyViews` comes
# after the quantization, whose tools know only the operators before it.
PASSES = {"fp16": (*_passes(mask=3e4), CopyViews()), "16a8w": _passes(mask=64.0), "8a8w": _passes(mask=20.0)}
