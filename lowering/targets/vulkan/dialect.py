"""What may stand in a program that was legalized for Vulkan."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.dialect import COPIED, NO_NORMS, NO_SILU, NO_SPLITS, legal, longer_than
from lowering.targets.vulkan.operators import MAX_LINEAR_RANK, MAX_RANK
from mobizo_passes.graph.dialect import Rule
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float

aten = torch.ops.aten


def _gelu(ir: Ir, node: Node) -> str:
    return f"its form '{arguments(node).approximate}'" if is_float(node) else ""


DIALECT = legal(
    "Vulkan",
    COPIED,
    NO_SPLITS,
    NO_SILU,
    Rule("GELU written out", (aten.gelu.default,), _gelu),
    NO_NORMS,
    longer_than(MAX_RANK, aten.permute_copy.default, aten.slice_copy.Tensor, aten.cat.default),
    longer_than(MAX_LINEAR_RANK, aten.linear.default, aten.bmm.default),
)
