"""Turn trainable parameters into program inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mobizo_passes.graph.ir import Input, Ir
from mobizo_passes.passes.base import Pass


@dataclass(frozen=True)
class LiftAdapter(Pass):
    """Make the trainable LoRA tensors the first inputs of the program.

    BEFORE  %b: f32[576, 16] = parameter 'q_proj.lora_B.default.weight'
    AFTER   %b: f32[576, 16] = adapter 'q_proj.lora_B.default.weight'
    """

    name: ClassVar[str] = "lift-adapter"
    requires: ClassVar[str] = "the named parameters are placeholders"
    ensures: ClassVar[str] = "adapter inputs stand before batch inputs, in the given order, and are no longer state"

    fqns: tuple[str, ...]

    def rewrite(self, ir: Ir) -> int:
        present = {n.meta["input"].name: n for n in ir.placeholders("parameter", "buffer")}
        batch = ir.placeholders("batch")[0]
        count = 0
        for fqn in self.fqns:
            node = present.get(fqn)
            if node is None:
                continue
            node.meta["input"] = Input("adapter", fqn)
            node.meta["pass"] = self.name
            ir.state.pop(fqn)
            batch.prepend(node)
            count += 1
        return count
