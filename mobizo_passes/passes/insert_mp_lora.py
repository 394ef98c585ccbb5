"""Make each product with a trainable factor a grouped product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.batching import Batch, Layout, track_batch
from mobizo_passes.errors import UnsupportedOp, describe
from mobizo_passes.graph.facts import facts, note, role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, Property, Violation
from mobizo_passes.sites.factors import Factor, as_product

aten = torch.ops.aten
mobizo = torch.ops.mobizo


def _trainable(ir: Ir) -> list[Factor]:
    return [f for node in ir.graph.nodes if (f := as_product(node)) and role(f.weight).kind == "adapter"]


def _left(ir: Ir) -> Iterator[Violation]:
    return ((factor.node, "one") for factor in _trainable(ir) if facts(factor.x).batched)


@dataclass(frozen=True)
class InsertMpLora(Pass):
    """Make every product of the batch with a trainable factor `mobizo::mp_lora` with one group (MP-LoRA, paper 3.2).

    BEFORE  %y: f32[4, 32, 576] = aten.linear(%h, %b)                               %b: f32[576, 16]
    AFTER   %w: f32[1, 576, 16] = aten.unsqueeze(%b, 0)
            %y: f32[4, 32, 576] = mobizo.mp_lora(%h, %w, dim=0, outer=1, transposed=False)
    """

    name: ClassVar[str] = "insert-mp-lora"
    ensures = (Property("no other product of the batch with a trainable factor", _left),)

    # Where the inputs hold the batch.
    batch: Batch
    # Where a value is taken to hold it that an operator without a rule lies before.
    batch_dim: int = 0

    def rewrite(self, ir: Ir) -> int:
        factors = _trainable(ir)
        if not factors and any(n.target is mobizo.mp_lora.default for n in ir.graph.nodes):
            return 0
        track_batch(ir, self.batch)
        grouped: dict[fx.Node, fx.Node] = {}
        count = 0
        for factor in factors:
            # Not `factor.x`: with lora_A trainable, the first product has just been replaced.
            operands: Any = factor.node.args
            x: fx.Node = operands[factor.at]
            # What holds no batch (DoRA's norm of the weights) differs per group only: that is the walk's business.
            if not facts(x).batched:
                continue
            if x.meta["val"].dim() < 2:
                raise UnsupportedOp(
                    f"a LoRA site needs an input with a batch dimension, found {list(x.meta['val'].shape)}: "
                    f"{describe(factor.node)}\n  pass example inputs that hold a batch"
                )
            if factor.weight not in grouped:
                first = next(n for n in ir.graph.nodes if n.op != "placeholder")
                with ir.graph.inserting_before(first):
                    grouped[factor.weight] = ir.call(aten.unsqueeze.default, factor.weight, 0, like=factor.node)
            self._replace(ir, factor, x, grouped[factor.weight])
            count += 1
        return count

    def _replace(self, ir: Ir, factor: Factor, x: fx.Node, weight: fx.Node) -> None:
        node = factor.node
        place = facts(x).layout or Layout(min(self.batch_dim, x.meta["val"].dim() - 2))
        with ir.graph.inserting_before(node):
            new = ir.call(mobizo.mp_lora.default, x, weight, place.dim, place.outer, factor.transposed, like=node)
            note(new, batched=True, layout=place)
            if factor.bias is not None:
                new = ir.call(aten.add.Tensor, new, factor.bias, like=node)
                note(new, batched=True, layout=place)
        ir.replace(node, new)
