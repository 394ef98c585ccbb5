"""The legalisation passes, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.forms.canonical_reshapes import CanonicalReshapes
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.core_forms import CoreForms
from lowering.passes.forms.expand_to_copies import ExpandToCopies
from lowering.passes.forms.normalise_dims import NormaliseDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.forms.split_to_slices import SplitToSlices
from lowering.passes.layers.decompose_activations import DecomposeActivations
from lowering.passes.layers.decompose_attention import DecomposeAttention
from lowering.passes.layers.decompose_norms import DecomposeNorms
from lowering.passes.layers.group_repeated_heads import GroupRepeatedHeads
from lowering.passes.layers.mean_to_linear import MeanToLinear
from lowering.passes.layers.products_to_bmm import ProductsToBmm
from lowering.passes.layers.scale_smaller_factor import ScaleSmallerFactor
from lowering.passes.layers.weights_to_linear import WeightsToLinear
from lowering.passes.values.float_scalars import FloatScalars
from lowering.passes.values.fold_constants import FoldConstants

PASSES: tuple[LegalisationPass, ...] = (
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
