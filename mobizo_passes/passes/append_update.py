"""Close the step: projected gradients and the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.inline import inline
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.passes import Pass, Property, Violation
from mobizo_passes.passes.insert_noise import NOISE, noise_nodes
from mobizo_passes.zo.scheme import Scheme

mobizo = torch.ops.mobizo


def _returned(ir: Ir) -> Iterator[Violation]:
    given = [role(node).name for node in ir.placeholders("adapter")]
    made = [spec.name for spec in ir.outputs if spec.kind in ("adapter", "gradient")]
    if given != made:
        yield None, f"{', '.join(made) or 'none'} for {', '.join(given)}"


@dataclass(frozen=True)
class AppendUpdate(Pass):
    """Turn losses per group into projected gradients and a new adapter (paper, eq. 1 and 2).

    The projected gradients that the step returns are normalized already if the estimator asks for it: the update, and
    the replay of a journal, take them as they are.

    BEFORE  return (%losses: f32[8],)
    AFTER   %g: f32[4] = mobizo.projected_gradients(%losses, %eps, 'two_sided')
            %n: f32[576, 16] = mobizo.update(%b, %z, %g, %lr)
            return (%loss: f32[], %losses: f32[8], %g: f32[4], %n: f32[576, 16], ...)

    Projected gradients that are outputs already, of a step that differentiates, are taken as they are.

    Without `update` it ends in the estimates of the gradient, ``mobizo.estimate(%z, %g)``, of which another pass makes
    a new adapter.
    """

    name: ClassVar[str] = "append-update"
    requires = (NOISE,)
    ensures = (Property("a new value, or a gradient, for each adapter input", _returned),)

    estimator: Scheme
    update: bool = True

    def rewrite(self, ir: Ir) -> int:
        if any(spec.kind in ("adapter", "gradient") for spec in ir.outputs):
            return 0
        outputs = []
        given = ir.placeholders("projected_gradients")
        computed = any(spec.kind == "projected_gradients" for spec in ir.outputs)
        lr = (ir.placeholders("lr") or [None])[0] or ir.add_input("lr", "lr", torch.zeros(1))
        end = ir.graph.output_node()
        with ir.graph.inserting_before(end):
            if given:
                gradients = given[0]
            else:
                if not computed:
                    ir.input("eps", "eps").prepend(lr)
                losses = ir.output_node("losses")
                # An estimator may be a user's, with state of its own.
                loss = inline(ir, self.estimator.loss, [losses], remember=False)
                gradients = ir.output_node("projected_gradients") if computed else self._differences(ir, losses)
                outputs += [
                    (Output("loss", "loss"), loss),
                    (Output("losses", "losses"), losses),
                    (Output("projected_gradients", "projected_gradients"), gradients),
                ]
            noise = noise_nodes(ir)
            for adapter in ir.placeholders("adapter"):
                fqn = role(adapter).name
                if self.update:
                    new = ir.call(mobizo.update.default, adapter, noise[fqn], gradients, lr)
                else:
                    new = ir.call(mobizo.estimate.default, noise[fqn], gradients)
                outputs.append((Output("adapter" if self.update else "gradient", fqn), new))
        ir.set_outputs(outputs)
        return len(ir.placeholders("adapter"))

    def _differences(self, ir: Ir, losses: fx.Node) -> fx.Node:
        normalize = [self.estimator.normalize] if self.estimator.normalize else []
        eps = ir.input("eps", "eps")
        return ir.call(mobizo.projected_gradients.default, losses, eps, self.estimator.kind, *normalize)
