"""Which values may be NaN in some rows and not in others: attention over nothing, 0 / 0, padding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, named
from mobizo_passes.graph.operators import operation_name

aten = torch.ops.aten

# Undefined for some numbers; the operand that must be positive for them not to be.
_PARTIAL: dict[str, int] = {
    **dict.fromkeys(("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "acos", "asin", "acosh"), 0),
    **dict.fromkeys(("atanh", "logit", "erfinv", "digamma", "lgamma"), 0),
    **dict.fromkeys(("div", "true_divide", "fmod", "remainder", "atan2", "xlogy"), 1),
}
_SQUARES = ("abs", "relu", "square", "sigmoid", "softmax", "_softmax", "var", "norm", "linalg_vector_norm", "softplus")
# What keeps the sign of its first operand.
_KEEPS = ("reshape", "view", "expand", "permute", "transpose", "unsqueeze", "squeeze", "_to_copy", "clone", "slice")
_SUMS = ("sum", "mean", "cumsum", "amax", "amin")


def may_hold_nan(ir: Ir, node: fx.Node) -> bool:
    """Return whether some rows of a value may be NaN while others are not, as far as the graph tells.

    Sources are infinite numbers (masks of -inf), floating-point inputs, and operators that are not defined everywhere,
    on operands that depend on the batch and are not seen to be positive. What is NaN whatever the batch needs no care.
    """
    reached = ir.reached(ir.placeholders("batch"))
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if _is_source(ir, current, reached):
            return True
        stack += current.all_input_nodes
    return False


def _is_source(ir: Ir, node: fx.Node, batch: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if node.op == "placeholder":
        spec = role(node)
        if spec.kind == "batch":
            return isinstance(value, Tensor) and value.is_floating_point()
        held = ir.state.get(spec.name)
        return spec.kind in ("buffer", "constant") and held is not None and not bool(held.isfinite().all())
    if any(isinstance(arg, float) and not math.isfinite(arg) for arg in (*node.args, *node.kwargs.values())):
        return True
    place = _PARTIAL.get(operation_name(node))
    if place is None and operation_name(node) == "pow":
        exponent = arguments(node).exponent
        place = None if isinstance(exponent, int | float) and exponent >= 0 and float(exponent).is_integer() else 0
    if place is None or not (isinstance(value, Tensor) and value.is_floating_point()):
        return False
    operand = list(named(node.target, node.args, node.kwargs).values())[place]
    return isinstance(operand, fx.Node) and operand in batch and not _positive(ir, operand)


def _positive(ir: Ir, node: Any) -> bool:
    """Whether every number of a value is above 0, or of a number itself."""
    if isinstance(node, int | float):
        return node > 0
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        held = ir.state.get(role(node).name)
        return held is not None and role(node).kind == "constant" and bool((held > 0).all())
    name, args = operation_name(node), node.args
    if name in ("exp", "sigmoid", "softplus"):
        return True
    if name in ("sqrt", "rsqrt", *_KEEPS, *_SUMS):
        return _positive(ir, args[0])
    if name == "add":
        return any(_positive(ir, a) and _at_least_0(ir, b) for a, b in (args[:2], args[1::-1]))
    if name in ("clamp", "clamp_min"):
        return _positive(ir, arguments(node).min)
    if name == "maximum":
        return any(_positive(ir, each) for each in args[:2])
    if name in ("mul", "div"):
        return all(_positive(ir, each) for each in args[:2])
    return False


def _at_least_0(ir: Ir, node: Any) -> bool:
    if isinstance(node, int | float):
        return node >= 0
    if not isinstance(node, fx.Node):
        return False
    name, args = operation_name(node), node.args
    if name in _SQUARES or _positive(ir, node):
        return True
    if name in ("sqrt", *_KEEPS, *_SUMS):
        return _at_least_0(ir, args[0])
    if name == "pow":
        return isinstance(args[1], int | float) and args[1] % 2 == 0
    if name == "mul":
        return args[0] is args[1] or all(_at_least_0(ir, each) for each in args[:2])
    return False
