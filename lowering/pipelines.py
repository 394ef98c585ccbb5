"""The legalisation passes of each target, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.canonical_reshapes import CanonicalReshapes
from lowering.passes.copy_views import CopyViews
from lowering.passes.core_forms import CoreForms
from lowering.passes.decompose_activations import DecomposeActivations
from lowering.passes.decompose_attention import DecomposeAttention
from lowering.passes.decompose_norms import DecomposeNorms
from lowering.passes.expand_to_copies import ExpandToCopies
from lowering.passes.float_scalars import FloatScalars
from lowering.passes.fold_constants import FoldConstants
from lowering.passes.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.mean_to_linear import MeanToLinear
from lowering.passes.normalise_dims import NormaliseDims
from lowering.passes.products_to_bmm import ProductsToBmm
from lowering.passes.remove_noops import RemoveNoops
from lowering.passes.scale_smaller_factor import ScaleSmallerFactor

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
    CanonicalReshapes(),
    GroupRepeatedHeads(),
    DecomposeAttention(),
    DecomposeNorms(),
    MeanToLinear(),
    DecomposeActivations(),
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
