"""Graph passes: one file, one class, one rewrite each. `mobizo_passes.pipelines` lists them in order."""

from mobizo_passes.graph.fold_constants import FoldConstants
from mobizo_passes.graph.passes import Pass
from mobizo_passes.passes.append_gradients import AppendGradients
from mobizo_passes.passes.append_optimizer import AppendOptimizer
from mobizo_passes.passes.append_update import AppendUpdate
from mobizo_passes.passes.canonicalize import Canonicalize
from mobizo_passes.passes.canonicalize_products import CanonicalizeProducts
from mobizo_passes.passes.combine_factors import CombineFactors
from mobizo_passes.passes.decompose import Decompose
from mobizo_passes.passes.decompose_for_batching import DecomposeForBatching
from mobizo_passes.passes.decompose_for_gradients import DecomposeForGradients
from mobizo_passes.passes.drop_shifts import DropShifts
from mobizo_passes.passes.expand_perturbations import ExpandPerturbations
from mobizo_passes.passes.expand_tangents import ExpandTangents
from mobizo_passes.passes.gather_labels import GatherLabels
from mobizo_passes.passes.hoist_selections import HoistSelections
from mobizo_passes.passes.insert_mp_lora import InsertMpLora
from mobizo_passes.passes.insert_noise import InsertNoise
from mobizo_passes.passes.internalize_adapter import InternalizeAdapter
from mobizo_passes.passes.lift_adapter import LiftAdapter
from mobizo_passes.passes.linearize import Linearize
from mobizo_passes.passes.recompute_layers import RecomputeLayers
from mobizo_passes.passes.regroup_loss import RegroupLoss
from mobizo_passes.passes.simplify_layouts import SimplifyLayouts
from mobizo_passes.passes.split_complex import SplitComplex
from mobizo_passes.passes.split_loss import SplitLoss
from mobizo_passes.passes.stack_noise import StackNoise
from mobizo_passes.passes.unstack_numbers import UnstackNumbers

__all__ = [
    "AppendGradients",
    "AppendOptimizer",
    "AppendUpdate",
    "Canonicalize",
    "CanonicalizeProducts",
    "CombineFactors",
    "Decompose",
    "DecomposeForBatching",
    "DecomposeForGradients",
    "DropShifts",
    "ExpandPerturbations",
    "ExpandTangents",
    "FoldConstants",
    "GatherLabels",
    "HoistSelections",
    "InsertMpLora",
    "InsertNoise",
    "InternalizeAdapter",
    "LiftAdapter",
    "Linearize",
    "Pass",
    "RecomputeLayers",
    "RegroupLoss",
    "SimplifyLayouts",
    "SplitComplex",
    "SplitLoss",
    "StackNoise",
    "UnstackNumbers",
]
