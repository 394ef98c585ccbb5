"""The legalisation passes of each target, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.bounded_norms import BoundedNorms
from lowering.passes.canonical_reshapes import CanonicalReshapes
from lowering.passes.copy_views import CopyViews
from lowering.passes.core_forms import CoreForms
from lowering.passes.decompose_activations import DecomposeActivations
from lowering.passes.decompose_attention import DecomposeAttention
from lowering.passes.decompose_norms import DecomposeNorms
from lowering.passes.equal_ranks import EqualRanks
from lowering.passes.expand_to_copies import ExpandToCopies
from lowering.passes.finite_masks import FiniteMasks
from lowering.passes.flat_linears import FlatLinears
from lowering.passes.float_scalars import FloatScalars
from lowering.passes.fold_constants import FoldConstants
from lowering.passes.gelu_to_exp import GeluToExp
from lowering.passes.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.mean_to_linear import MeanToLinear
from lowering.passes.merge_axes import MergeAxes
from lowering.passes.normalise_dims import NormaliseDims
from lowering.passes.patches_to_linear import PatchesToLinear
from lowering.passes.products_to_bmm import ProductsToBmm
from lowering.passes.reduce_last_axis import ReduceLastAxis
from lowering.passes.remove_noops import RemoveNoops
from lowering.passes.scalars_to_constants import ScalarsToConstants
from lowering.passes.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.split_to_slices import SplitToSlices
from lowering.passes.weights_to_linear import WeightsToLinear
from lowering.passes.whole_norms import WholeNorms

PORTABLE: tuple[LegalisationPass, ...] = (
    RemoveNoops(),
    FoldConstants(),
    CoreForms(),
    CanonicalReshapes(),
    NormaliseDims(),
    FloatScalars(),
    ExpandToCopies(multiply_floats=False),
    RemoveNoops(),
    CopyViews(),
)

XNNPACK: tuple[LegalisationPass, ...] = (
    RemoveNoops(),
    FoldConstants(),
    CoreForms(),
    SplitToSlices(),
    CanonicalReshapes(),
    GroupRepeatedHeads(),
    DecomposeAttention(),
    DecomposeNorms(),
    MeanToLinear(),
    DecomposeActivations(),
    WeightsToLinear(),
    ProductsToBmm(),
    ScaleSmallerFactor(),
    ExpandToCopies(),
    NormaliseDims(),
    FloatScalars(),
    FoldConstants(),
    CanonicalReshapes(),
    RemoveNoops(),
    CopyViews(),
)


def _vulkan(mask: float, norms: tuple[LegalisationPass, ...] = ()) -> tuple[LegalisationPass, ...]:
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


VULKAN = _vulkan(mask=1e9)
VULKAN_FP16 = _vulkan(mask=3e4, norms=(BoundedNorms(),))


def _qnn(mask: float) -> tuple[LegalisationPass, ...]:
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


QNN = (*_qnn(mask=3e4), CopyViews())
# A mask shares its integers with the scores: the larger it is, the coarser they become. `CopyViews` comes after the
# quantisation, whose tools know only the operators before it.
QNN_16A8W = _qnn(mask=64.0)
QNN_8A8W = _qnn(mask=20.0)
