"""Take our own operators apart into core ATen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes import noise
from mobizo_passes.capture.finiteness import may_hold_nan
from mobizo_passes.graph.inline import inline
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, named
from mobizo_passes.graph.ops import DECOMPOSITIONS, one_hot_gather
from mobizo_passes.graph.passes import FUNCTIONAL, Pass, absent

aten = torch.ops.aten
mobizo = torch.ops.mobizo


def token_loss(
    scores: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of [N, C] scores against int64 [N] targets, as log-softmax and a gather along dim 1.

    `reduction` is torch's: 0 gives one loss per row, 1 their weighted mean, 2 their sum.
    """
    counted = target != ignore_index
    index = torch.where(counted, target, torch.zeros_like(target)).unsqueeze(1)
    losses = -torch.gather(torch.log_softmax(scores, 1), 1, index).squeeze(1)
    # Not a product with 0: an ignored row may be NaN.
    losses = torch.where(counted, losses, torch.zeros_like(losses))
    weights = counted.to(losses.dtype)
    if weight is not None:
        weights = weights * torch.index_select(weight, 0, index.squeeze(1))
        losses = losses * weights
    if reduction == 0:
        return losses
    return losses.sum(0) if reduction == 2 else losses.sum(0) / weights.sum(0)


def draw(
    seed: Tensor, ids: Tensor, table: Tensor | None, queries: int, numel: int, kind: str, shape: list[int]
) -> Tensor:
    """Noise of the sites `ids`, as `noise.draw` gives it, in the shape asked for."""
    return noise.draw(seed, ids, table, queries, numel, kind).reshape(shape)


@dataclass(frozen=True)
class Decompose(Pass):
    """Replace every `mobizo::` node, and cross-entropy, by the ATen nodes of its definition.

    BEFORE  %y: f32[32, 32, 576] = mobizo.mp_lora(%h, %w, 0, 1, False)
    AFTER   %v: f32[8, 128, 16] = aten.view(%h, [8, 128, 16]);  %t = aten.transpose(%w, 1, 2)
            %m: f32[8, 128, 576] = aten.bmm(%v, %t);  %y: f32[32, 32, 576] = aten.view(%m, [32, 32, 576])
    """

    name: ClassVar[str] = "decompose"
    requires = (FUNCTIONAL,)
    ensures = (absent(*DECOMPOSITIONS, aten.cross_entropy_loss.default),)

    def rewrite(self, ir: Ir) -> int:
        count = 0
        shared: dict[Any, fx.Node] = {}
        for node in list(ir.graph.nodes):
            fn, operands = _definition(ir, node, shared)
            if fn is None:
                continue
            with ir.before(node):
                ir.replace(node, inline(ir, fn, operands, node))
            count += 1
        return count


def _definition(ir: Ir, node: fx.Node, shared: dict[Any, fx.Node]) -> tuple[Callable[..., Any] | None, list[Any]]:
    args: list[Any] = list(node.args)
    target: Any = node.target
    if node.target in (mobizo.noise.default, mobizo.noise_stack.default):
        seed, sites, queries, shape, kind = args
        sites = [sites] if isinstance(sites, int) else list(sites)
        lead = [] if node.target is mobizo.noise.default else [len(sites)]
        ids = ir.add_constant("noise_sites", torch.tensor(sites, dtype=torch.int64))
        if "table" not in shared and kind == "gaussian":
            shared["table"] = ir.add_constant("normal_quantiles", noise.quantile_table())
        return draw, [seed, ids, shared.get("table"), queries, math.prod(shape), kind, [*lead, queries, *shape]]
    if target is mobizo.gather_rows.default and not may_hold_nan(ir, args[0]):
        return one_hot_gather, args
    if target in DECOMPOSITIONS:
        return DECOMPOSITIONS[target], args
    if node.target is aten.cross_entropy_loss.default:
        given, args = arguments(node), list(named(target, node.args, node.kwargs).values())
        plain = given.target.meta["val"].dtype is torch.int64 and given.self.meta["val"].dim() == 2
        if plain and not given.label_smoothing:
            return token_loss, args[:5]
        return aten.cross_entropy_loss.default.decompose, args
    return None, []
