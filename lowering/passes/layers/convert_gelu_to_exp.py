"""The exact GELU in functions that every GPU has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, is_float

aten = torch.ops.aten

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7 in erf.
_P = 0.3275911
_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@dataclass(frozen=True)
class ConvertGeluToExp:
    """Exact `gelu` becomes a polynomial times an exponential.

    BEFORE  y = gelu(x)                                                        x * normal_cdf(x)
    AFTER   a = abs(x);  t = 1 / (1 + a * p/sqrt(2));  y = relu(x) - a * t * poly4(t) * exp(-a*a/2) / 2

    Vulkan's shader computes the tanh form whatever the model asks for (off by up to 5e-4), and has no `erf`. Off by at
    most 1e-7 * |x|. The tanh form itself is left to `DecomposeActivations`.
    """

    name: str = "convert-gelu-to-exp"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.gelu.default):
            if arguments(node).approximate != "none" or not is_float(node):
                continue
            with editor.before(node):
                editor.replace(node, _rewrite(editor, node.args[0]))
            rewrites += 1
        return rewrites


def _rewrite(editor: ProgramEditor, x: Any) -> Node:
    def multiply(a: Node, b: Node | float) -> Node:
        return editor.call(aten.mul.Tensor, a, b)

    size = editor.call(aten.abs.default, x)
    # exp(-log(1 + c*a)) would do as well; a division costs less.
    below = editor.call(aten.add.Tensor, multiply(size, _P / math.sqrt(2.0)), 1.0)
    one = editor.constant(torch.ones(1, dtype=x.meta["val"].dtype), "one", ("one", x.meta["val"].dtype))
    t = editor.call(aten.div.Tensor, one, below)
    poly = multiply(t, 0.5 * _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        poly = multiply(editor.call(aten.add.Tensor, poly, 0.5 * coefficient), t)
    fall = editor.call(aten.exp.default, multiply(multiply(size, size), -0.5))
    tail = multiply(size, multiply(poly, fall))
    return editor.call(aten.sub.Tensor, editor.call(aten.relu.default, x), tail)
