"""Norms that are written out: the one product rule that is better not taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mobizo_passes.graph.nodes import arguments
from mobizo_passes.reverse.table import Call
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """``y = x · r`` with ``r = rsqrt(mean(x²) + ε)`` over `dims`, which are kept."""

    x: fx.Node
    r: fx.Node
    dims: list[int]

    def tangent(self, call: Call, dx: Value) -> Value:
        """ẏ / r = ẋ − y · mean(y · ẋ); the chain of its parts has r³ in it, which small precisions can't hold."""
        y = call.out
        return dx - y * (dx * y).call(aten.mean.dim, self.dims, True)


def find_norm(node: fx.Node) -> Norm | None:
    """Return the norm whose last product this is, if it is one."""
    if node.target is not aten.mul.Tensor:
        return None
    operands: list[Any] = list(node.args)
    for x, r in (operands, operands[::-1]):
        dims = _over(x, r)
        if dims is not None:
            return Norm(x, r, dims)
    return None


def _over(x: Any, r: Any) -> list[int] | None:
    """The dimensions, if r is the reciprocal root of the mean square of x."""
    shifted = _operand(r, aten.rsqrt.default)
    mean = _operand(shifted, aten.add.Tensor, aten.add.Scalar)
    square = _operand(mean, aten.mean.dim)
    if shifted is None or mean is None or square is None:
        return None
    if not arguments(mean).keepdim or not isinstance(arguments(shifted).other, float):
        return None
    squared = square.target is aten.mul.Tensor and square.args == (x, x)
    squared |= square.target is aten.square.default and square.args == (x,)
    squared |= square.target is aten.pow.Tensor_Scalar and square.args == (x, 2)
    return list(arguments(mean).dim) if squared else None


def _operand(node: fx.Node | None, *targets: Any) -> fx.Node | None:
    operand: Any = node.args[0] if isinstance(node, fx.Node) and node.target in targets else None
    return operand
