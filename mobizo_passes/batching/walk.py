"""The batching engine: walks a graph once and applies a rule to each perturbed node."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layouts
from mobizo_passes.batching.per_group import per_group
from mobizo_passes.graph.facts import note
from mobizo_passes.graph.nodes import arguments


class Walk(Batcher):
    """A batcher on its way through a graph."""

    def run(self, seeds: Mapping[fx.Node, Layouts]) -> int:
        """Batch everything downstream of `seeds`, which are batched already; returns the number of batched nodes."""
        self.layouts.update(seeds)
        count = 0
        for node in list(self.ir.graph.nodes):
            if not node._erased and node.op == "call_function" and node not in self.layouts:
                count += self.batch_node(node)
        return count

    def batch_node(self, node: fx.Node) -> int:
        """Batch one node if an argument of it is batched; returns how many it batched, 0 or 1."""
        if not any(arg in self.layouts for arg in node.all_input_nodes):
            return 0
        self.plain[node] = node.meta["val"]
        with self.ir.graph.inserting_before(node):
            layouts = self._apply(node)
        if node._erased:
            return 1
        try:
            self.ir.refresh(node)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).strip().splitlines()
            raise self.unsupported(node, f"it does not run on {self.groups} groups: {reason[0]}") from error
        self.check(node, layouts)
        if layouts is None:
            return 0
        self.layouts[node] = layouts
        note(node, expanded=True)
        return 1

    def _apply(self, node: fx.Node) -> Layouts:
        if node.target is operator.getitem:
            layouts = self.layouts[arguments(node).source]
            return layouts[arguments(node).index] if isinstance(layouts, tuple) else layouts
        own_weight = node.target is torch.ops.mobizo.mp_lora.default
        if not own_weight and any(self.per_group(arg) for arg in node.all_input_nodes):
            return per_group(self, node)
        return self.ordinary(node)
