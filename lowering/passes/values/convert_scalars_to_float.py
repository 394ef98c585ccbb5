"""Whole numbers that meet float tensors, written as floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import is_float
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


@dataclass(frozen=True)
class ConvertScalarsToFloat(Pass):
    """Python ints in float arithmetic become floats.

    BEFORE  y = div(x: f32[q], 4)
    AFTER   y = div(x: f32[q], 4.0)

    ExecuTorch turns a scalar into a tensor of its own type, so an int costs an int64 constant and a cast at each call.
    """

    name: ClassVar[str] = "convert-scalars-to-float"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*ARITHMETIC):
            scalar = node.args[1]
            if isinstance(scalar, int) and not isinstance(scalar, bool) and is_float(node.args[0]) and is_float(node):
                node.args = (node.args[0], float(scalar), *node.args[2:])
                rewrites += 1
        return rewrites
