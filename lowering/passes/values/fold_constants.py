"""Compute at lowering time what depends on no input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from lowering.executorch_compat.tags import tag_like
from mobizo_passes.graph import fold_constants
from mobizo_passes.graph.ir import CONSTANT_KINDS


@dataclass(frozen=True)
class FoldConstants(fold_constants.FoldConstants):
    """Position ids, rotary tables, causal masks, label-word rows: computed once, here, instead of at every call.

    BEFORE  a = arange(T); f = mul(reshape(a, [1,T,1]), inv_freq); c = cos(cat([f, f], -1)); use(c: f32[1,T,d])
    AFTER   use(constant: f32[1,T,d])

    Weights too: transposed or scaled, they are as large as before. The noise generator's counters are cheaper to count
    than to store.
    """

    max_bytes: int = 1 << 20
    kinds: tuple[str, ...] = CONSTANT_KINDS

    def folded(self, constant: Node, sources: Iterable[Node]) -> None:
        tag_like(constant, sources)
