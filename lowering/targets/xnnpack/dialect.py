"""What may stand in a program that was legalized for XNNPACK."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.dialect import COPIED, NO_NORMS, NO_SILU, NO_SPLITS, legal, longer_than
from mobizo_passes.graph.dialect import Rule
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of

aten = torch.ops.aten


def _computed_factor(ir: Ir, node: Node) -> str:
    given = arguments(node)
    weight = given.weight
    while weight.op == "call_function" and weight.target is aten.permute_copy.default:
        weight = arguments(weight).self
    computed = not ir.is_constant(weight) and is_float(node) and len(shape_of(given.input)) > 1
    return f"%{given.weight.name}, which is computed" if computed else ""


def _tanh(ir: Ir, node: Node) -> str:
    return "its tanh form" if is_float(node) and arguments(node).approximate != "none" else ""


def _small_power(ir: Ir, node: Node) -> str:
    return str(arguments(node).exponent) if is_float(node) and arguments(node).exponent in (2, 3) else ""


DIALECT = legal(
    "XNNPACK",
    COPIED,
    NO_SPLITS,
    Rule("a weight behind every linear", (aten.linear.default,), _computed_factor),
    longer_than(3, aten.bmm.default),
    NO_SILU,
    Rule("exact GELU alone", (aten.gelu.default,), _tanh),
    Rule("products instead of small powers", (aten.pow.Tensor_Scalar,), _small_power),
    NO_NORMS,
)
