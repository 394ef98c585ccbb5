"""Turn trainable parameters into program inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mobizo_passes.graph.facts import note, role
from mobizo_passes.graph.ir import Input, Ir
from mobizo_passes.graph.passes import Pass, Property, Violation, has_input


def _behind(ir: Ir) -> Iterator[Violation]:
    seen = False
    for node in ir.placeholders("batch", "adapter"):
        seen = seen or role(node).kind == "batch"
        if seen and role(node).kind == "adapter":
            yield node, "it behind one"


@dataclass(frozen=True)
class LiftAdapter(Pass):
    """Make the trainable LoRA tensors the first inputs of the program.

    BEFORE  %b: f32[576, 16] = parameter 'q_proj.lora_B.default.weight'
    AFTER   %b: f32[576, 16] = adapter 'q_proj.lora_B.default.weight'
    """

    name: ClassVar[str] = "lift-adapter"
    requires = (has_input("batch"),)
    ensures = (Property("adapter inputs in front of those of the batch", _behind),)

    fqns: tuple[str, ...]

    def rewrite(self, ir: Ir) -> int:
        present = {role(n).name: n for n in ir.placeholders("parameter", "buffer")}
        batch = ir.placeholders("batch")[0]
        count = 0
        for fqn in self.fqns:
            node = present.get(fqn)
            if node is None:
                continue
            note(node, role=Input("adapter", fqn))
            note(node, made_by=self.name)
            ir.state.pop(fqn)
            batch.prepend(node)
            count += 1
        return count
