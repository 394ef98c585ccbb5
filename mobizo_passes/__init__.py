"""Compile PyTorch models with LoRA adapters into programs that fine-tune themselves with forward passes only."""

from __future__ import annotations

from mobizo_passes import reference
from mobizo_passes.batching.register import BatchDims, register_batching_rule, unregister_batching_rule
from mobizo_passes.errors import (
    BatchCoupled,
    BatchingRuleError,
    CaptureError,
    InputError,
    LibraryMissing,
    MobizoError,
    NoLoRASites,
    ParseError,
    UnsupportedOp,
    VerificationFailed,
)
from mobizo_passes.graph import ops
from mobizo_passes.graph.parse import parse
from mobizo_passes.graph.passes import PassRecord
from mobizo_passes.program import TrainingProgram
from mobizo_passes.reference import StepResult
from mobizo_passes.sites.adapter_kinds import AdapterKind, register_adapter_kind, unregister_adapter_kind
from mobizo_passes.sites.select import LoRASite
from mobizo_passes.transform import transform
from mobizo_passes.verify import verify
from mobizo_passes.zo.estimators import (
    Estimator,
    Exact,
    ForwardGradient,
    OneSided,
    TwoSided,
    register_estimator,
    unregister_estimator,
)
from mobizo_passes.zo.optimizers import SGD, AdamW, Momentum, Optimizer

__all__ = [
    "SGD",
    "AdamW",
    "AdapterKind",
    "BatchCoupled",
    "BatchDims",
    "BatchingRuleError",
    "CaptureError",
    "Estimator",
    "Exact",
    "ForwardGradient",
    "InputError",
    "LibraryMissing",
    "LoRASite",
    "MobizoError",
    "Momentum",
    "NoLoRASites",
    "OneSided",
    "Optimizer",
    "ParseError",
    "PassRecord",
    "StepResult",
    "TrainingProgram",
    "TwoSided",
    "UnsupportedOp",
    "VerificationFailed",
    "ops",
    "parse",
    "reference",
    "register_adapter_kind",
    "register_batching_rule",
    "register_estimator",
    "transform",
    "unregister_adapter_kind",
    "unregister_batching_rule",
    "unregister_estimator",
    "verify",
]
