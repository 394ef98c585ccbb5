"""Lifting rules: how each operator runs on P groups fused into one dimension, or why it can't.

A rule proves that an operator treats the groups independently and says where they lie in its result. An operator
without a rule is refused by name, never guessed.
"""

from __future__ import annotations

from . import compute, indexing, shapes
from .batch import Batch, find_batch, track_batch
from .compute import RECURRENT
from .lifter import PER_GROUP, RULES, Layout, Lifter

__all__ = [
    "PER_GROUP",
    "RECURRENT",
    "RULES",
    "Batch",
    "Layout",
    "Lifter",
    "compute",
    "find_batch",
    "indexing",
    "shapes",
    "track_batch",
]
