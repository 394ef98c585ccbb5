"""Say which constants are the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowering.executorch_compat.tags import is_tagged, tag
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass


@dataclass(frozen=True)
class TagWeights(Pass):
    """The model's parameters and buffers are tagged, to be stored in a file outside of the program.

    BEFORE  w: f32[d,k] (parameter);  A: f32[r,k] (parameter, of the adapter);  t: i64[T] (made by the compiler)
    AFTER   w: f32[d,k], tagged;      A: f32[r,k];                              t: i64[T]

    `adapter` are the FQNs of the adapter's tensors: programs with other adapters share the weights, not these. Neither
    do they share what depends on the batch, the estimator or the noise, all of which the compiler made. What later
    passes compute from tagged weights alone is tagged too.
    """

    adapter: frozenset[str] = frozenset()
    name: ClassVar[str] = "tag-weights"

    def rewrite(self, ir: Ir) -> int:
        found = 0
        for node in ir.placeholders("parameter", "buffer"):
            if role(node).name not in self.adapter and not is_tagged(node):
                tag(node)
                found += 1
        return found
