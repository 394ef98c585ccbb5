"""What may stand in a program that was legalised for Vulkan."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.dialect import COPIED, SPLITS, legal, longer_than
from lowering.targets.vulkan.operators import MAX_LINEAR_RANK, MAX_RANK
from mobizo_passes.graph.dialect import Rule
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float

aten = torch.ops.aten


def _gelu(ir: Ir, node: Node) -> str:
    return f"its form '{arguments(node).approximate}'" if is_float(node) else ""


def _over_one_axis(ir: Ir, node: Node) -> str:
    return "one over the last axis" if len(arguments(node).normalized_shape) == 1 else ""


DIALECT = legal(
    "Vulkan",
    COPIED,
    Rule("slices instead of splits", SPLITS),
    Rule("x * sigmoid(x)", (aten.silu.default,)),
    Rule("GELU written out", (aten.gelu.default,), _gelu),
    Rule("norms taken apart", (aten.layer_norm.default, aten.rms_norm.default), _over_one_axis),
    longer_than(MAX_RANK, aten.permute_copy.default, aten.slice_copy.Tensor, aten.cat.default),
    longer_than(MAX_LINEAR_RANK, aten.linear.default, aten.bmm.default),
)
