"""Floating-point operations of a graph, split into what is computed once and what once per group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir

aten = torch.ops.aten


@dataclass(frozen=True)
class Flops:
    """FLOPs (2 per multiply-add) of matrix-like nodes: `shared` on the plain batch, `expanded` on all groups."""

    shared: int
    expanded: int
    groups: int

    @property
    def total(self) -> int:
        return self.shared + self.expanded

    @property
    def share_computed_once(self) -> float:
        """Share, 0 to 1, of one forward's FLOPs that the step computes once instead of P times."""
        one_forward = self.shared + self.expanded / self.groups
        return self.shared / one_forward if one_forward else 0.0


def node_flops(node: fx.Node) -> int:
    """Return the FLOPs of a matrix-like node from its shapes; 0 for element-wise and data-moving nodes."""
    if node.op != "call_function":
        return 0
    val = node.meta["val"]
    # Not `all_input_nodes`, which names an operand once even where it is used twice.
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    shapes = [tuple(a.meta["val"].shape) for a in operands if isinstance(a.meta.get("val"), torch.Tensor)]
    if node.target in (aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default):
        return 2 * val.numel() * shapes[0][-1]
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        return 2 * val.numel() * shapes[1][-1]
    if node.target is torch.ops.mobizo.mp_lora.default:
        return 2 * val.numel() * shapes[0][-1]
    if node.target is torch.ops.mobizo.mp_conv.default:
        return 2 * val.numel() * math.prod(shapes[1][2:])
    if node.target is torch.ops.mobizo.gather_rows.default:
        return 2 * val.numel() * shapes[0][1]
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = shapes[0], shapes[1]
        return 2 * math.prod(query) * key[-2] + 2 * val.numel() * key[-2]
    if node.target in (aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
        return 2 * val.numel() * math.prod(shapes[1][1:])
    return 0


def count_flops(ir: Ir, groups: int) -> Flops:
    """Count a graph's FLOPs."""
    shared = expanded = 0
    for node in ir.graph.nodes:
        if node.meta.get("expanded"):
            expanded += node_flops(node)
        else:
            shared += node_flops(node)
    return Flops(shared, expanded, groups)
