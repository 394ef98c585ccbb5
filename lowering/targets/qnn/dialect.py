"""What may stand in a program that was legalized for Qualcomm's NPU."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.dialect import COPIED, NO_SILU, NO_SPLITS, legal, longer_than
from lowering.passes.values.convert_scalars_to_float import ARITHMETIC
from mobizo_passes.graph.dialect import Dialect, Rule
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float, shape_of

aten = torch.ops.aten


def _number(ir: Ir, node: Node) -> str:
    plain = len(node.args) == 2 and not node.kwargs and shape_of(node)
    numbers = [each for each in node.args if isinstance(each, (int, float))]
    return f"the number {numbers[0]}" if plain and is_float(node) and numbers else ""


def _ranks(ir: Ir, node: Node) -> str:
    ranks = {len(shape_of(each)) for each in (node, *node.all_input_nodes) if is_float(each)}
    return f"{min(ranks)} and {max(ranks)} axes" if is_float(node) and len(ranks) > 1 else ""


def dialect(copies: bool) -> Dialect:
    """With `copies`, views are copies already; where values are quantized first, they become so later."""
    return legal(
        "QNN",
        *((COPIED,) if copies else ()),
        NO_SPLITS,
        Rule("tensors in float arithmetic", ARITHMETIC, _number),
        Rule("operands of one rank", ARITHMETIC, _ranks),
        NO_SILU,
        longer_than(2, aten.linear.default),
    )
