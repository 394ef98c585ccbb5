"""Give every trainable tensor its noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from mobizo_passes.graph.facts import facts, note, role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, Property, Violation
from mobizo_passes.noise import site_ids


def without_noise(ir: Ir) -> Iterator[Violation]:
    """Yield the adapter inputs that have no noise node."""
    have = noise_nodes(ir)
    return ((node, "none") for node in ir.placeholders("adapter") if role(node).name not in have)


NOISE = Property("noise for every adapter tensor", without_noise)


@dataclass(frozen=True)
class InsertNoise(Pass):
    """Add z = noise(seed, query, site, element) for each adapter input; the seed becomes a program input.

    BEFORE  %b: f32[576, 16] = adapter
    AFTER   %b: f32[576, 16] = adapter;  %seed: i64[1]
            %z: f32[4, 576, 16] = mobizo.noise(%seed, 2774538621, 4, [576, 16], 'gaussian')
    """

    name: ClassVar[str] = "insert-noise"
    ensures = (NOISE,)

    prunes: ClassVar[bool] = False

    queries: int
    kind: str

    def rewrite(self, ir: Ir) -> int:
        have = noise_nodes(ir)
        adapters = [n for n in ir.placeholders("adapter") if role(n).name not in have]
        if not adapters:
            return 0
        ids = site_ids(role(n).name for n in ir.placeholders("adapter"))
        seeds = ir.placeholders("seed")
        seed = seeds[0] if seeds else ir.add_input("seed", "seed", torch.zeros(1, dtype=torch.int64))
        # Computed first and used last: the same z serves perturbation and update.
        body = next(n for n in ir.graph.nodes if n.op != "placeholder")
        for adapter in adapters:
            fqn = role(adapter).name
            shape = list(adapter.meta["val"].shape)
            with ir.graph.inserting_before(body):
                node = ir.call(torch.ops.mobizo.noise.default, seed, ids[fqn], self.queries, shape, self.kind)
            note(node, noise_of=fqn)
        return len(adapters)


def noise_nodes(ir: Ir) -> dict[str, torch.fx.Node]:
    """Return the noise node of every adapter input that has one, by FQN."""
    return {facts(n).noise_of: n for n in ir.graph.nodes if facts(n).noise_of}
