"""Say which constants are the model's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch.export.graph_signature import InputKind

from lowering.editor import ProgramEditor
from lowering.executorch_compat.tags import is_tagged, tag


@dataclass(frozen=True)
class TagWeights:
    """The model's parameters and buffers are tagged, to be stored in a file outside of the program.

    BEFORE  w: f32[d,k] (parameter);  A: f32[r,k] (parameter, of the adapter);  t: i64[T] (made by the compiler)
    AFTER   w: f32[d,k], tagged;      A: f32[r,k];                              t: i64[T]

    `adapter` are the FQNs of the adapter's tensors: programs with other adapters share the weights, not these. Neither
    do they share what depends on the batch, the estimator or the noise, all of which the compiler made. What later
    passes compute from tagged weights alone is tagged too.
    """

    adapter: frozenset[str] = frozenset()
    name: str = "tag-weights"

    def __call__(self, editor: ProgramEditor) -> int:
        found = 0
        for node in editor.graph.nodes:
            kind = editor.kind_of(node)
            if kind not in (InputKind.PARAMETER, InputKind.BUFFER) or not editor.is_constant(node):
                continue
            if editor.fqn_of(node) not in self.adapter and not is_tagged(node):
                tag(node)
                found += 1
        return found
