"""Make each product with a trainable factor a grouped product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ..errors import UnsupportedOp, describe
from ..ir import Ir
from ..sites import Factor, as_factor
from .base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class InsertMpLora(Pass):
    """Replace every product with a trainable factor by `mobizo::mp_lora` with one group (MP-LoRA, paper section 3.2).

    BEFORE  %y: f32[4, 32, 576] = aten.linear(%h, %b)                               %b: f32[576, 16]
    AFTER   %w: f32[1, 576, 16] = aten.unsqueeze(%b, 0)
            %y: f32[4, 32, 576] = mobizo.mp_lora(%h, %w, dim=0, outer=1, transposed=False)
    """

    name: ClassVar[str] = "insert-mp-lora"
    requires: ClassVar[str] = "lifted adapter inputs, each read only as a factor of a matrix product"
    ensures: ClassVar[str] = "an adapter input is read by one unsqueeze, and that by mp_lora nodes only"

    batch_dim: int = 0

    def rewrite(self, ir: Ir) -> int:
        factors = [f for node in ir.graph.nodes if (f := as_factor(node)) and f.weight.meta["input"].kind == "adapter"]
        taken = {f.node for f in factors}
        for adapter in ir.placeholders("adapter"):
            for user in _final_users(adapter):
                if user not in taken and not _grouped(user):
                    raise UnsupportedOp(
                        f"the trainable tensor '{adapter.meta['input'].name}' is used by something else than a matrix "
                        f"product: {describe(user)}\n  leave the site out with sites=, or train the other tensors only"
                    )
        grouped: dict[fx.Node, fx.Node] = {}
        for factor in factors:
            grouped[factor.weight] = self._replace(ir, factor, grouped.get(factor.weight))
        return len(factors)

    def _replace(self, ir: Ir, factor: Factor, weight: fx.Node | None) -> fx.Node:
        if weight is None:
            first = next(n for n in ir.graph.nodes if n.op != "placeholder")
            with ir.graph.inserting_before(first):
                weight = ir.call(aten.unsqueeze.default, factor.weight, 0, like=factor.node)
        # Not `factor.x`: with lora_A trainable, the first product has just been replaced.
        x: Any = factor.node.args[0]
        if x.meta["val"].dim() < 2:
            raise UnsupportedOp(
                f"a LoRA site needs an input with a batch dimension, found {list(x.meta['val'].shape)}: "
                f"{describe(factor.node)}\n  pass example inputs that hold a batch"
            )
        with ir.graph.inserting_before(factor.node):
            new = ir.call(
                torch.ops.mobizo.mp_lora.default,
                x,
                weight,
                min(self.batch_dim, x.meta["val"].dim() - 2),
                1,
                factor.transposed,
                like=factor.node,
            )
        factor.node.replace_all_uses_with(new)
        ir.graph.erase_node(factor.node)
        return weight


def _final_users(node: fx.Node) -> list[fx.Node]:
    """Users of a stored matrix, looking through its transposes."""
    users: list[fx.Node] = []
    for user in node.users:
        is_transpose = user.target in (aten.t.default, aten.transpose.int, aten.permute.default)
        users += _final_users(user) if is_transpose else [user]
    return users


def _grouped(node: fx.Node) -> bool:
    return node.target is aten.unsqueeze.default and all(
        u.target is torch.ops.mobizo.mp_lora.default for u in node.users
    )
