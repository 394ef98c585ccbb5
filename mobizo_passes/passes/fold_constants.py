"""Compute at compile time what depends on no input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes.base import Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate nodes that read only constants and buffers: position ids, rotary tables, causal masks.

    Parameters are left alone (folding them would copy weights).

    BEFORE  %r: i64[32] = aten.arange(32);  %m: b8[32, 32] = aten.le(%r, %c)
    AFTER   %m: b8[32, 32]  (constant input)
    """

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[str] = "a functional graph without random operators"
    ensures: ClassVar[str] = "no node whose arguments are all constants"

    max_elements: int = 1 << 24

    def rewrite(self, ir: Ir) -> int:
        known: dict[fx.Node, Tensor] = {
            n: ir.state[n.meta["input"].name] for n in ir.placeholders("buffer", "constant")
        }
        folded: list[fx.Node] = []
        for node in ir.graph.nodes:
            if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            if node.meta["val"].numel() > self.max_elements or any(n not in known for n in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
            folded.append(node)
        made: dict[tuple[object, ...], fx.Node] = {}
        for node in folded:
            # Only the last node of a folded chain becomes a constant; the others die with it.
            if any(user not in known for user in node.users):
                value = known[node].contiguous()
                key = (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
                if key not in made:
                    made[key] = ir.add_constant(node.name, value.clone())
                constant = made[key]
                ir.substitute(node, constant, keep=[u for u in node.users if u in known])
        return len(folded)
