"""The legalisation passes, in the order in which they run."""

from __future__ import annotations

from lowering.passes.base import LegalisationPass
from lowering.passes.forms.canonical_reshapes import CanonicalReshapes
from lowering.passes.forms.copy_views import CopyViews
from lowering.passes.forms.core_forms import CoreForms
from lowering.passes.forms.expand_to_copies import ExpandToCopies
from lowering.passes.forms.normalise_dims import NormaliseDims
from lowering.passes.forms.remove_noops import RemoveNoops
from lowering.passes.values.float_scalars import FloatScalars
from lowering.passes.values.fold_constants import FoldConstants

PASSES: tuple[LegalisationPass, ...] = (
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
