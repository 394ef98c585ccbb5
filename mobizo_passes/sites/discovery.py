"""Candidates for LoRA sites on the captured graph, by structure and by parameter name.

By structure, a site is two linear maps in sequence through a narrower middle whose output, scaled or not, is added to
another map of the same input; or the product of two stored matrices that is added to a stored weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import named
from mobizo_passes.sites.factors import Factor, as_factor
from mobizo_passes.sites.lora_site import (
    Candidate,
    LoRASite,
    is_named,
    module_name,
    product,
)
from mobizo_passes.sites.merged import merged_candidates
from mobizo_passes.sites.tracing import ALONE, LAYOUTS, Scalings, Tracer

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """Nodes passed on the way from one linear map to another: their factors, and the first that is not linear."""

    end: fx.Node
    scalings: tuple[float | None, ...] = ()
    bent: fx.Node | None = None


class Candidates(Tracer):
    """The search, over one graph."""

    def __init__(self, ir: Ir) -> None:
        super().__init__(ir)
        self._weight_scalings: dict[fx.Node, Scalings] = {}
        self._factors: dict[fx.Node, Factor] = {}
        for node in ir.graph.nodes:
            factor = as_factor(node) or self._scaled_factor(node)
            if factor is not None:
                self._factors[node] = factor

    def _scaled_factor(self, node: fx.Node) -> Factor | None:
        """Read a product of the batch with a stored matrix that is scaled before, as in ``x @ (A * e).T``."""
        is_product = node.target in (aten.linear.default, aten.matmul.default, aten.mm.default)
        if not is_product or node.kwargs or node not in self.batched:
            return None
        x, weight, *rest = named(node.target, node.args, {}).values()
        found = self.weight(weight)
        if found is None or x not in self.batched:
            return None
        placeholder, transposed, self._weight_scalings[node] = found
        bias = rest[0] if rest else None
        return Factor(node, x, placeholder, transposed ^ (node.target is not aten.linear.default), bias)

    def all(self) -> list[Candidate]:
        """Return one candidate per pair of weights, in graph order; where uses differ, the one that is taken.

        A use that reads the batch counts for more than one among weights alone, such as DoRA's norm.
        """
        best: dict[tuple[str, str], Candidate] = {}
        for found in (*self._search(), *merged_candidates(self)):
            key = found.site.lora_A, found.site.lora_B
            known = best.get(key)
            if known is None or self._rank(found) > self._rank(known):
                best[key] = found
        return [c for c in best.values() if not (c.reason and c.node in self.bases)]

    def _rank(self, candidate: Candidate) -> tuple[bool, bool]:
        return not candidate.reason, candidate.node in self.batched

    def _search(self) -> Iterator[Candidate]:
        for up in self._factors.values():
            if up.kind == "embedding":
                continue
            walk = self._back(up.x)
            down = self._factors.get(walk.end)
            while down is not None and down.sizes[0] == down.sizes[1] and down.kind == "linear":
                # A square matrix between the factors (LoRA-XS) scales them; without a factor behind it, it is one.
                further = self._back(down.x)
                if further.bent is not None or self._factors.get(further.end) is None or further.end is down.node:
                    break
                if self._factors[further.end].sizes[1] != down.sizes[0]:
                    break
                walk = Trace(further.end, (*walk.scalings, None, *further.scalings), walk.bent)
                down = self._factors[further.end]
            if down is not None and down.fqn != up.fqn:
                candidate = self._judge(down, up, walk)
                if candidate is not None:
                    yield candidate

    def _back(self, node: fx.Node) -> Trace:
        """Walk up from an operand through scalings, layouts and inactive dropout, and at most one bent node."""
        scalings: Scalings = []
        bent: fx.Node | None = None
        while node.op == "call_function" and node not in self._factors:
            step = self.scaled(node)
            if step is not None:
                node, factors = step
                scalings += factors
            elif node.target in LAYOUTS:
                node = node.all_input_nodes[0]
            elif bent is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
                batched = [a for a in node.all_input_nodes if a in self.batched]
                if len(batched) != 1:
                    break
                bent, node = node, batched[0]
            else:
                break
        return Trace(node, tuple(scalings), bent)

    def _judge(self, down: Factor, up: Factor, walk: Trace) -> Candidate | None:
        (fan_in, rank), (_, fan_out) = down.sizes, up.sizes
        named = is_named(down.fqn, up.fqn)
        # What a row of the kernel sees: a convolution has more inputs than channels.
        kernel = math.prod(down.weight.meta["val"].shape[2:])
        inputs = fan_in * kernel if down.kind.startswith("conv") else fan_in
        narrow = rank < min(inputs, fan_out)
        scalings, miss = self.added(up.node, down.x, up.bias)
        kind = down.kind if down.kind != "linear" else up.kind
        weights = [*self._weight_scalings.get(down.node, []), *self._weight_scalings.get(up.node, [])]
        site = LoRASite(
            module_name(down.fqn, up.fqn), down.fqn, up.fqn, rank,
            product([*walk.scalings, *scalings, *weights]), fan_in, fan_out, kind,
        )  # fmt: skip
        if walk.bent is not None:
            # Every small network has narrow layers around an activation; an adapter's output is added to something.
            if not named and (not narrow or miss == ALONE):
                return None
            reason = f"%{walk.bent.name} = {walk.bent.target} stands between its two linear maps"
            return Candidate(site, reason, up.node)
        if named:
            return Candidate(site, "", up.node)
        if miss:
            return Candidate(site, f"a bottleneck of rank {rank}, but {miss}", up.node) if narrow else None
        if not narrow:
            reason = f"its rank {rank} is no less than its {inputs} inputs or {fan_out} outputs"
            return Candidate(site, reason, up.node)
        return Candidate(site, "", up.node)
