"""A placeholder of its own for each product's weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lowering.executorch_compat.tags import tag_like
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten

_WEIGHTED = (aten.linear.default, aten.mm.default, aten.convolution.default, aten.conv2d.default, aten.conv1d.default)


@dataclass(frozen=True)
class SplitSharedWeights(Pass):
    """A weight that a product shares with something else gets a second placeholder, over the same tensor.

    BEFORE  e = embedding(w: f32[V,d], ids);  y = linear(x, w)
    AFTER   e = embedding(w, ids);            y = linear(x, w': f32[V,d])            w' and w are one tensor

    ExecuTorch puts a product's weight into the partition. If something outside reads it too, the partitioner sees a
    path from the partition out and back in, and cuts the graph in two. `whole` are FQNs to leave shared. What products
    alone read stays one: in two placeholders it would be mapped twice while the delegate copies it.
    """

    whole: frozenset[str] = frozenset()
    name: ClassVar[str] = "split-shared-weights"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(*_WEIGHTED):
            weight: Any = node.args[1]
            if not ir.is_constant(weight) or role(weight).name in self.whole:
                continue
            if all(user.target in _WEIGHTED for user in weight.users):
                continue
            own = ir.add_constant("own_weight", ir.constant_value(weight))
            tag_like(own, [weight])
            node.replace_input_with(weight, own)
            rewrites += 1
        return rewrites
