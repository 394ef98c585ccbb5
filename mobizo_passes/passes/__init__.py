"""Graph passes: one file, one class, one rewrite each. `mobizo_passes.pipelines` lists them in order."""

from .base import Pass
from .canonical_products import CanonicalProducts
from .canonicalize import Canonicalize
from .decompose import Decompose
from .expand_perturbations import ExpandPerturbations
from .finish_step import FinishStep
from .fold_constants import FoldConstants
from .gather_labels import GatherLabels
from .hoist_selections import HoistSelections
from .insert_mp_lora import InsertMpLora
from .insert_noise import InsertNoise
from .internalize_adapter import InternalizeAdapter
from .lift_adapter import LiftAdapter
from .regroup_loss import RegroupLoss
from .simplify_layouts import SimplifyLayouts
from .split_loss import SplitLoss
from .stack_noise import StackNoise

__all__ = [
    "CanonicalProducts",
    "Canonicalize",
    "Decompose",
    "ExpandPerturbations",
    "FinishStep",
    "FoldConstants",
    "GatherLabels",
    "HoistSelections",
    "InsertMpLora",
    "InsertNoise",
    "InternalizeAdapter",
    "LiftAdapter",
    "Pass",
    "RegroupLoss",
    "SimplifyLayouts",
    "SplitLoss",
    "StackNoise",
]
