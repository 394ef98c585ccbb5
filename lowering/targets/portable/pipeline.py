"""The legalization passes, in the order in which they run."""

from __future__ import annotations

from lowering.passes.forms.canonicalize_reshapes import CanonicalizeReshapes
from lowering.passes.forms.convert_expands_to_copies import ConvertExpandsToCopies
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.lower_to_core_aten import LowerToCoreAten
from lowering.passes.forms.normalize_dims import NormalizeDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.values.convert_scalars_to_float import ConvertScalarsToFloat
from lowering.passes.values.fold_constants import FoldConstants
from mobizo_passes.graph.passes import Pass

PASSES: tuple[Pass, ...] = (
    RemoveNoops(),
    FoldConstants(),
    LowerToCoreAten(),
    CanonicalizeReshapes(),
    NormalizeDims(),
    ConvertScalarsToFloat(),
    ConvertExpandsToCopies(multiply_floats=False),
    RemoveNoops(),
    CopyViews(),
)
