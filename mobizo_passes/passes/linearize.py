"""Differentiate the loss forward, along one direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mobizo_passes.batching import Batch, track_batch
from mobizo_passes.errors import UnsupportedOp, describe
from mobizo_passes.forward.engine import tangent
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.passes import Pass, has_input, has_output

#: A tangent's name is that of its adapter tensor, and this.
SUFFIX = ".tangent"


@dataclass(frozen=True)
class Linearize(Pass):
    """Give each adapter tensor a tangent, an input for now, and follow it to the loss: ∇L(θ)·tangent.

    BEFORE  %y: f32[4, 32, 576] = aten.linear(%h, %b);  return %l: f32[1] = losses
    AFTER   %t: f32[576, 16] = tangent 'q_proj.lora_B.tangent'
            %y: f32[4, 32, 576] = aten.linear(%h, %b);  %dy: f32[4, 32, 576] = aten.linear(%h, %t)
            return %l: f32[1] = losses;  return %dl: f32[1] = projected_gradients

    Values keep their operators: each that a tangent reaches has further ones beside it.
    """

    name: ClassVar[str] = "linearize"
    requires = (has_output("losses"), has_input("adapter"))
    ensures = (has_output("projected_gradients"),)

    # Where the inputs hold the batch: of the new values too it is noted where they do.
    batch: Batch

    def rewrite(self, ir: Ir) -> int:
        if any(spec.kind == "projected_gradients" for spec in ir.outputs):
            return 0
        losses = ir.output_node("losses")
        seeds: dict[fx.Node, fx.Node] = {}
        for node in ir.placeholders("adapter"):
            seeds[node] = ir.add_input("tangent", role(node).name + SUFFIX, node.meta["val"])
        found = tangent(ir, losses, seeds)
        if found is None:
            raise UnsupportedOp(f"the loss has no derivative in any adapter tensor: {describe(losses)}")
        made = Output("projected_gradients", "projected_gradients")
        ir.set_outputs([(Output("losses", "losses"), losses), (made, found)])
        ir.eliminate_dead_code()
        track_batch(ir, self.batch)
        return len(seeds)
