"""Draw the noise of equal sites together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import Pass, Property, Violation

mobizo = torch.ops.mobizo


def _equal(ir: Ir) -> dict[tuple[Any, ...], list[fx.Node]]:
    """Noise nodes by all that must agree for them to be drawn together."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for node in ir.find(mobizo.noise.default):
        given = arguments(node)
        groups[given.seed, given.queries, tuple(given.shape), given.kind].append(node)
    return groups


def _unstacked(ir: Ir) -> Iterator[Violation]:
    return ((nodes[1], "two") for nodes in _equal(ir).values() if len(nodes) > 1)


@dataclass(frozen=True)
class StackNoise(Pass):
    """Replace noise nodes of one shape by one stacked node: a tenth of the operators, the same bits.

    BEFORE  %z0: f32[4, 576, 16] = mobizo.noise(%seed, 11, 4, [576, 16], 'gaussian');  %z1: ... (%seed, 22, ...)
    AFTER   %s: f32[2, 4, 576, 16] = mobizo.noise_stack(%seed, [11, 22], 4, [576, 16], 'gaussian')
            %z0: f32[4, 576, 16] = aten.select(%s, 0, 0);  %z1: f32[4, 576, 16] = aten.select(%s, 0, 1)
    """

    name: ClassVar[str] = "stack-noise"
    ensures = (Property("one noise node for each shape", _unstacked),)

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for (seed, queries, shape, kind), nodes in _equal(ir).items():
            if len(nodes) < 2:
                continue
            with ir.graph.inserting_before(nodes[0]):
                sites = [arguments(n).site for n in nodes]
                stack = ir.call(mobizo.noise_stack.default, seed, sites, queries, list(shape), kind)
            for i, node in enumerate(nodes):
                with ir.graph.inserting_before(node):
                    ir.replace(node, ir.call(torch.ops.aten.select.int, stack, 0, i))
                count += 1
        return count
