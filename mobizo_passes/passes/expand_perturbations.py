"""Run all perturbed copies in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mobizo_passes.batching import PER_GROUP, Walk
from mobizo_passes.batching.batcher import Layouts
from mobizo_passes.graph.facts import note, role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import shape_of
from mobizo_passes.graph.passes import Pass, Violation, has_output
from mobizo_passes.passes.insert_noise import NOISE, noise_nodes
from mobizo_passes.zo.scheme import Scheme

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandPerturbations(Pass):
    """Perturb the adapter P ways and widen everything that they reach to P groups (P-RGE, paper section 3).

    Groups are fused into the batch dimension, group-major. Values that no perturbed tensor reaches stay on the plain
    batch and are expanded where they meet a perturbed one (late expansion).

    BEFORE  %w: f32[1, 576, 16] = aten.unsqueeze(%b, 0)
            %y: f32[4, 32, 576] = mobizo.mp_lora(%h, %w, 0, 1, False)
            %s: f32[4, 32, 576] = aten.add(%base, %y)
    AFTER   %w: f32[8, 576, 16] = mobizo.perturb(%b, %z, %eps, 'two_sided')
            %hx: f32[32, 32, 16] = mobizo.expand(%h, 8, 0, 1)
            %y: f32[32, 32, 576] = mobizo.mp_lora(%hx, %w, 0, 1, False)
            %bx: f32[32, 32, 576] = mobizo.expand(%base, 8, 0, 1)
            %s: f32[32, 32, 576] = aten.add(%bx, %y)
    """

    name: ClassVar[str] = "expand-perturbations"
    requires = (
        has_output("losses"),
        NOISE,
    )

    estimator: Scheme

    def unmet(self, ir: Ir) -> Iterator[Violation]:
        """As many losses as groups."""
        losses = ir.output_node("losses")
        if ir.find(torch.ops.mobizo.perturb.default) and shape_of(losses) != (self.estimator.groups,):
            yield losses, f"{list(shape_of(losses))} losses for {self.estimator.groups} groups"

    def rewrite(self, ir: Ir) -> int:
        return 0 if ir.placeholders("eps") else self.expand(ir)[1]

    def expand(self, ir: Ir) -> tuple[Walk, int]:
        """Rewrite a graph that has no epsilon; the walk that did it knows where each value holds its groups."""
        eps = ir.add_input("eps", "eps", torch.zeros(1))
        batcher = Walk(ir, self.estimator.groups)
        seeds: dict[fx.Node, Layouts] = {}
        noise = noise_nodes(ir)
        for adapter in ir.placeholders("adapter"):
            z = noise[role(adapter).name]
            if not adapter.users:  # the loss does not read it
                continue
            # The noise nodes stand first in the body, so the first reader stands after all of them.
            first = min(adapter.users)
            with ir.graph.inserting_before(first):
                weight = ir.call(torch.ops.mobizo.perturb.default, adapter, z, eps, self.estimator.kind, like=first)
            note(weight, expanded=True)
            batcher.plain[weight] = adapter.meta["val"]
            for user in [u for u in adapter.users if u is not weight]:
                if user.target is aten.unsqueeze.default and _is_weight(user):
                    ir.replace(user, weight)
                else:
                    user.replace_input_with(adapter, weight)
            seeds[weight] = PER_GROUP
        return batcher, batcher.run(seeds)


def _is_weight(node: fx.Node) -> bool:
    return all(u.target is torch.ops.mobizo.mp_lora.default and u.args[1] is node for u in node.users)
