"""Which weights XNNPACK packs when a program is loaded, and which it reads from the mapped file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch.export import ExportedProgram

from lowering.targets.tied import product_weight
from mobizo_passes.graph.nodes import val


def weights_of_products(programs: Iterable[ExportedProgram]) -> dict[str, int]:
    """Bytes of every constant that a `linear` or `mm` reads, by FQN, in the order in which they are read."""
    found: dict[str, int] = {}
    for program in programs:
        for node in program.graph.nodes:
            fqn = product_weight(program, node)
            if fqn is not None:
                weight: Any = node.args[1]
                found[fqn] = val(weight).nbytes
    return found


def largest_third(weights: Mapping[str, int], tables: Collection[str]) -> frozenset[str]:
    """Of these weights the largest that fit, the first read among equals, into a third of all their bytes.

    A weight that a step reads in both directions is packed twice, and the file's own pages are let go after that:
    packed, it takes as much memory again. The larger a matrix, the more time that saves for a byte. Embedding `tables`
    are not chosen: they would be in the file twice.
    """
    room = sum(weights.values()) // 3
    chosen: set[str] = set()
    for fqn in sorted(weights, key=lambda each: -weights[each]):
        if fqn not in tables and weights[fqn] <= room:
            room -= weights[fqn]
            chosen.add(fqn)
    return frozenset(chosen)
