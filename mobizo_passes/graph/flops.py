"""Floating-point operations of a graph, split into what is computed once and what once per group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import Arguments, arguments, shape_of
from mobizo_passes.graph.operators import operation_name


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


def _last(name: str) -> Callable[[Arguments, int], int]:
    """Each result is a product of as many pairs as the named operand has in its last dimension."""
    return lambda args, results: results * shape_of(getattr(args, name))[-1]


def _kernel(lead: int) -> Callable[[Arguments, int], int]:
    """Each result is a product with one kernel: the weight without its first `lead` dimensions."""
    return lambda args, results: results * math.prod(shape_of(args.weight)[lead:])


def _convolution(args: Arguments, results: int) -> int:
    # Transposed, each input is spread by one kernel.
    inputs = math.prod(shape_of(args.input))
    return (inputs if args.transposed else results) * math.prod(shape_of(args.weight)[1:])


def _attention(args: Arguments, results: int) -> int:
    keys = shape_of(args.key)[-2]
    return (math.prod(shape_of(args.query)) + results) * keys


# Multiply-adds of one call, from its arguments and the number of its results; what is not here costs none.
_MULTIPLY_ADDS: Mapping[str, Callable[[Arguments, int], int]] = {
    "linear": _last("input"),
    "mm": _last("self"),
    "bmm": _last("self"),
    "matmul": _last("self"),
    "addmm": _last("mat1"),
    "baddbmm": _last("batch1"),
    "conv1d": _kernel(1),
    "conv2d": _kernel(1),
    "conv3d": _kernel(1),
    "convolution": _convolution,
    "scaled_dot_product_attention": _attention,
    "mp_lora": _last("x"),
    "mp_conv": _kernel(2),
    # It becomes a product with a one-hot matrix.
    "gather_rows": lambda args, results: results * shape_of(args.x)[1],
}


def node_flops(node: fx.Node) -> int:
    """Return the FLOPs of a product, convolution or attention, in any dialect, from its shapes; 0 for other nodes."""
    if node.op != "call_function":
        return 0
    count = _MULTIPLY_ADDS.get(operation_name(node))
    value: Any = node.meta.get("val")
    return 0 if count is None or not isinstance(value, Tensor) else 2 * count(arguments(node), value.numel())


def count_flops(ir: Ir, groups: int) -> Flops:
    """Count a graph's FLOPs."""
    shared = expanded = 0
    for node in ir.graph.nodes:
        if facts(node).expanded:
            expanded += node_flops(node)
        else:
            shared += node_flops(node)
    return Flops(shared, expanded, groups)
