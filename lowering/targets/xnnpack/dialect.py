"""What may stand in a program that was legalised for XNNPACK."""

from __future__ import annotations

import torch
from torch.fx import Node

from lowering.dialect import COPIED, SPLITS, legal, longer_than
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


def _over_one_axis(ir: Ir, node: Node) -> str:
    return "one over the last axis" if len(arguments(node).normalized_shape) == 1 else ""


DIALECT = legal(
    "XNNPACK",
    COPIED,
    Rule("slices instead of splits", SPLITS),
    Rule("a weight behind every linear", (aten.linear.default,), _computed_factor),
    longer_than(3, aten.bmm.default),
    Rule("x * sigmoid(x)", (aten.silu.default,)),
    Rule("exact GELU alone", (aten.gelu.default,), _tanh),
    Rule("products instead of small powers", (aten.pow.Tensor_Scalar,), _small_power),
    Rule("norms taken apart", (aten.layer_norm.default, aten.rms_norm.default), _over_one_axis),
)
