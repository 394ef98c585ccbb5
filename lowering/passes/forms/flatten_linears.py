"""Linear layers on rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import is_float, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class FlattenLinears:
    """`linear` on a tensor of rank `least_rank` or more works on its rows.

    BEFORE  y = linear(x: f32[N,T,d], w: f32[o,d])
    AFTER   y = reshape(linear(reshape(x, [N*T,d]), w), [N,T,o])

    QNN's fully connected layer gives a matrix, whatever the rank of what it is given. Vulkan's shader is right up to
    rank 3; of four axes, where the first is above 1, it writes the first slice alone.
    """

    least_rank: int = 3

    name: str = "flatten-linears"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(aten.linear.default):
            x: Any = node.args[0]
            shape = shape_of(x)
            if len(shape) < self.least_rank or not is_float(node):
                continue
            with editor.before(node):
                rows = editor.reshape(x, [math.prod(shape[:-1]), shape[-1]])
                product = editor.call(aten.linear.default, rows, *node.args[1:], **node.kwargs)
                editor.replace(node, editor.reshape(product, list(shape_of(node))))
            rewrites += 1
        return rewrites
