"""Batching rules: how each operator runs on P groups fused into one dimension, or why it can't.

A rule proves that an operator treats the groups independently and says where they lie in its result. An operator
without a rule is refused by name, never guessed.
"""

from __future__ import annotations

from mobizo_passes.batching import along, compute, indexing, shapes
from mobizo_passes.batching.batch import Batch, find_batch, track_batch
from mobizo_passes.batching.batcher import PER_GROUP, RULES, Batcher, Layout
from mobizo_passes.batching.walk import Walk

__all__ = [
    "PER_GROUP",
    "RULES",
    "Batch",
    "Batcher",
    "Layout",
    "Walk",
    "along",
    "compute",
    "find_batch",
    "indexing",
    "shapes",
    "track_batch",
]
