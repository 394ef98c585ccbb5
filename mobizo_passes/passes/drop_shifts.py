"""Leave to a softmax what it does itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, positive_dim, set_arguments, shape_of
from mobizo_passes.graph.passes import FUNCTIONAL, Pass

aten = torch.ops.aten

_SOFTMAXES: Sequence[Any] = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
)  # fmt: skip


@dataclass(frozen=True)
class DropShifts(Pass):
    """Take a softmax of scores instead of scores minus their maximum, or minus any other number of a row.

    BEFORE  %m: (f32[4, 1], i64[4, 1]) = aten.max(%x, -1, True);  %y: f32[4, 9] = aten.softmax(%x - %m[0], -1)
    AFTER   %y: f32[4, 9] = aten.softmax(%x, -1)

    The same values: a softmax subtracts the maximum before it raises to powers, and a shift does not change it.
    """

    name: ClassVar[str] = "drop-shifts"
    requires = (FUNCTIONAL,)

    def rewrite(self, ir: Ir) -> int:
        found = [(node, scores) for node in ir.find(*_SOFTMAXES) if (scores := _shifted(node)) is not None]
        for node, scores in found:
            set_arguments(node, self=scores)
        return len(found)


def _shifted(node: fx.Node) -> fx.Node | None:
    """The scores of a softmax over their difference to one number for each row."""
    given = arguments(node)
    shifted = given.self
    if shifted.target is not aten.sub.Tensor or not isinstance(shifted.args[1], fx.Node):
        return None
    scores, shift = shifted.args
    shape, dim = shape_of(shifted), positive_dim(given.dim, len(shape_of(shifted)))
    one = (1,) * (len(shape) - len(shape_of(shift))) + shape_of(shift)
    fits = isinstance(scores, fx.Node) and shape_of(scores) == shape and one[dim] == 1 and shape[dim] != 1
    return scores if fits and scores.meta["val"].dtype == shifted.meta["val"].dtype else None
