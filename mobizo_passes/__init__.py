"""Compile LoRA-bearing PyTorch models into programs that fine-tune themselves with forward passes only."""

from __future__ import annotations

from . import ops, reference
from .errors import (
    BatchCoupled,
    CaptureError,
    InputError,
    MobizoError,
    NoLoRASites,
    UnsupportedOp,
    VerificationFailed,
)
from .estimators import OneSided, TwoSided
from .program import PassRecord, TrainingProgram
from .reference import StepResult
from .sites import LoRASite
from .transform import transform
from .verify import verify

__all__ = [
    "BatchCoupled",
    "CaptureError",
    "InputError",
    "LoRASite",
    "MobizoError",
    "NoLoRASites",
    "OneSided",
    "PassRecord",
    "StepResult",
    "TrainingProgram",
    "TwoSided",
    "UnsupportedOp",
    "VerificationFailed",
    "ops",
    "reference",
    "transform",
    "verify",
]
