"""Run all tangents side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.batching import PER_GROUP, Walk
from mobizo_passes.batching.batcher import Layouts
from mobizo_passes.graph.facts import note, role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import shape_of
from mobizo_passes.graph.passes import Pass, Violation, has_output
from mobizo_passes.passes.insert_noise import NOISE, noise_nodes
from mobizo_passes.passes.linearize import SUFFIX

aten = torch.ops.aten
mobizo = torch.ops.mobizo


@dataclass(frozen=True)
class ExpandTangents(Pass):
    """Let the noise of all queries be the tangents, and widen what they reach to one group for each query.

    Groups are fused into the batch dimension, group-major, as those of perturbed copies are. The primal values, and all
    that is made of them alone, stay on the plain batch.

    BEFORE  %t: f32[576, 16] = tangent 'q_proj.lora_B.tangent';  %z: f32[4, 576, 16] = mobizo.noise(...)
            %dy: f32[4, 32, 576] = aten.linear(%h, %t)
    AFTER   %z: f32[4, 576, 16] = mobizo.noise(...);  %hx: f32[16, 32, 16] = mobizo.expand(%h, 4, 0, 1)
            %dy: f32[16, 32, 576] = mobizo.mp_lora(%hx, %z, 0, 1, False)
    """

    name: ClassVar[str] = "expand-tangents"
    requires = (has_output("projected_gradients"), NOISE)
    # Noise that no tangent is made of is still the update's.
    prunes: ClassVar[bool] = False

    queries: int

    def unmet(self, ir: Ir) -> Iterator[Violation]:
        """No tangent that is an input, and a projected gradient for each query."""
        yield from ((node, "a tangent that is an input") for node in ir.placeholders("tangent"))
        gradients = ir.output_node("projected_gradients")
        if shape_of(gradients) != (self.queries,):
            yield gradients, f"{list(shape_of(gradients))} projected gradients for {self.queries} queries"

    def rewrite(self, ir: Ir) -> int:
        tangents = ir.placeholders("tangent")
        if not tangents:
            return 0
        noise = noise_nodes(ir)
        walk = Walk(ir, self.queries)
        seeds: dict[fx.Node, Layouts] = {}
        for node in tangents:
            z = noise[role(node).name.removesuffix(SUFFIX)]
            walk.plain[z] = node.meta["val"]
            seeds[z] = PER_GROUP
            node.replace_all_uses_with(z)
            ir.graph.erase_node(node)
        count = walk.run(seeds)
        self._close(ir, walk)
        return count

    def _close(self, ir: Ir, walk: Walk) -> None:
        """A gradient that comes from weights alone is stacked, [P, 1], not fused."""
        gradients = ir.output_node("projected_gradients")
        if shape_of(gradients) == (self.queries,):
            return
        with ir.graph.inserting_after(gradients):
            flat = ir.call(aten.reshape.default, gradients, [self.queries], like=gradients)
        note(flat, expanded=True)
        outputs: Any = ir.graph.output_node().args[0]
        ir.set_outputs([(s, flat if n is gradients else n) for s, n in zip(ir.outputs, outputs, strict=True)])
