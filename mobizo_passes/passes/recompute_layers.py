"""Let the gradient compute the values of a layer again instead of holding them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import facts, module_of
from mobizo_passes.graph.inline import call_again
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, has_output
from mobizo_passes.passes.append_gradients import AppendGradients


@dataclass(frozen=True)
class RecomputeLayers(Pass):
    """What a gradient reads of a layer's values is computed again from the layer's input, right before it is read.

    BEFORE  %h = aten.silu(%x) in layers.0; %y = aten.mul(%h, %u) in layers.0; …  %gu = aten.mul(%g, %h)
    AFTER   %h = …; %y = …; …  %h' = aten.silu(%x);  %gu = aten.mul(%g, %h')

    A layer is a module that its parent holds under a number, the outermost one. Its inputs are held, and so is what
    stands in no layer. The last layer's values are needed at once, so they are not computed again.
    """

    name: ClassVar[str] = "recompute-layers"
    requires = (has_output("gradient"),)

    def rewrite(self, ir: Ir) -> int:
        nodes = [node for node in ir.graph.nodes if node.op == "call_function"]
        if any(facts(node).made_by == self.name for node in nodes):
            return 0
        backward = [node for node in nodes if facts(node).made_by == AppendGradients.name]
        gradient = set(backward)
        layers = {node: layer for node in nodes if node not in gradient and (layer := layer_of(node))}
        if not layers:
            raise InputError(
                "checkpoint='layer' needs layers: modules that their parent holds under a number, as in "
                "torch.nn.ModuleList; this model has none between the adapter and the loss"
            )
        last = list(layers.values())[-1]
        held = {node for node in layers if layers[node] == last or _leaves(node, layers, gradient)}
        again = _Again(ir, {node for node in layers if node not in held})
        for node in backward:
            with ir.graph.inserting_before(node):
                for each in node.all_input_nodes:
                    if each in again.values:
                        node.replace_input_with(each, again.of(each))
        return len(again.made)


def layer_of(node: fx.Node) -> tuple[str, ...]:
    """Return the FQN of the layer that a node was captured in, in parts; empty if it is in none."""
    parts = module_of(node).split(".")
    return next((tuple(parts[: place + 1]) for place, part in enumerate(parts) if part.isdigit()), ())


def _leaves(node: fx.Node, layers: dict[fx.Node, tuple[str, ...]], gradient: set[fx.Node]) -> bool:
    """Whether the forward reads the node outside of its layer."""
    return any(user not in gradient and layers.get(user) != layers[node] for user in node.users)


@dataclass
class _Again:
    ir: Ir
    values: set[fx.Node]
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def of(self, wanted: fx.Node) -> fx.Node:
        """Write a value, and what it is made of, at the insertion point unless it has been written before."""
        for node in self._missing(wanted):
            self.made[node] = call_again(self.ir, node, self.made)
        return self.made[wanted]

    def _missing(self, wanted: fx.Node) -> Iterator[fx.Node]:
        """What has to be written for a value, in order."""
        waiting: list[Any] = [(wanted, False)]
        while waiting:
            node, ready = waiting.pop()
            if node in self.made or node not in self.values:
                continue
            if ready:
                yield node
            else:
                waiting.append((node, True))
                waiting += [(each, False) for each in node.all_input_nodes]
