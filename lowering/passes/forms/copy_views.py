"""Views as copies, which is what they become on a device anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, absent

aten = torch.ops.aten

COPIES: dict[Any, Any] = {
    aten.reshape.default: aten.view_copy.default,
    aten.permute.default: aten.permute_copy.default,
    aten.slice.Tensor: aten.slice_copy.Tensor,
    aten.expand.default: aten.expand_copy.default,
}


@dataclass(frozen=True)
class CopyViews(Pass):
    """`reshape`, `permute`, `slice` and `expand` become their functional `_copy` forms; runs last.

    BEFORE  y = reshape(permute(x: f32[N,H,T,d], [0,2,1,3]), [N,T,H*d])
    AFTER   y = view_copy(permute_copy(x, [0,2,1,3]), [N,T,H*d])

    ExecuTorch's edge dialect has only these. Made by us, they come without the `clone` that decomposing a `reshape` of
    a permuted tensor leaves between the two, which XNNPACK would run as a copy. Every value is inferred anew, so that
    none keeps the memory layout of a view or of a node that is gone.
    """

    name: ClassVar[str] = "copy-views"
    ensures = (absent(*COPIES),)

    def rewrite(self, ir: Ir) -> int:
        nodes = ir.find(*COPIES)
        for node in nodes:
            node.target = COPIES[node.target]
        for node in ir.graph.nodes:
            if node.op == "call_function":
                ir.refresh(node)
        return len(nodes)
