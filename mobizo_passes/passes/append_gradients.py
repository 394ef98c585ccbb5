"""Append the exact gradient of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.passes import Pass, has_input, has_output
from mobizo_passes.reverse.engine import gradients


@dataclass(frozen=True)
class AppendGradients(Pass):
    """Write reverse-mode differentiation out as further nodes: ∂loss of every adapter tensor.

    BEFORE  %l: f32[] = aten.mean(%y, [0]);  return (%l,)
    AFTER   %g: f32[576, 16] = aten.matmul(%t, %h);  return (%l, %g, ...)

    Only what lies between the loss and the lowest adapter tensor is differentiated.
    """

    name: ClassVar[str] = "append-gradients"
    requires = (has_output("loss"), has_input("adapter"))
    ensures = (has_output("gradient"),)

    def rewrite(self, ir: Ir) -> int:
        if any(spec.kind == "gradient" for spec in ir.outputs):
            return 0
        loss, adapter = ir.output_node("loss"), ir.placeholders("adapter")
        with ir.graph.inserting_before(ir.graph.output_node()):
            found = gradients(ir, loss, adapter)
        names = [role(node).name for node in adapter]
        outputs = [(Output("gradient", name), node) for name, node in zip(names, found, strict=True)]
        ir.set_outputs([(Output("loss", "loss"), loss), *outputs])
        return len(adapter)
