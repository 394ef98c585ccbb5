"""Compile PyTorch models with LoRA adapters into programs that fine-tune themselves with forward passes only."""

from __future__ import annotations

from mobizo_passes import reference
from mobizo_passes.batching.register import BatchDims, register_batching_rule, unregister_batching_rule
from mobizo_passes.errors import (
    BatchCoupled,
    BatchingRuleError,
    CaptureError,
    InputError,
    MobizoError,
    NoLoRASites,
    UnsupportedOp,
    VerificationFailed,
)
from mobizo_passes.graph import ops
from mobizo_passes.program import PassRecord, TrainingProgram
from mobizo_passes.reference import StepResult
from mobizo_passes.sites.select import LoRASite
from mobizo_passes.transform import transform
from mobizo_passes.verify import verify
from mobizo_passes.zo.estimators import (
    Estimator,
    Exact,
    OneSided,
    TwoSided,
    register_estimator,
    unregister_estimator,
)
from mobizo_passes.zo.optimizers import SGD, AdamW, Momentum, Optimizer

__all__ = [
    "SGD",
    "AdamW",
    "BatchCoupled",
    "BatchDims",
    "BatchingRuleError",
    "CaptureError",
    "Estimator",
    "Exact",
    "InputError",
    "LoRASite",
    "MobizoError",
    "Momentum",
    "NoLoRASites",
    "OneSided",
    "Optimizer",
    "PassRecord",
    "StepResult",
    "TrainingProgram",
    "TwoSided",
    "UnsupportedOp",
    "VerificationFailed",
    "ops",
    "reference",
    "register_batching_rule",
    "register_estimator",
    "transform",
    "unregister_batching_rule",
    "unregister_estimator",
    "verify",
]
