"""Remove operations that compute nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.identities import ASSERTIONS, COPIES, is_identity, same_type
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.passes import Pass, absent

aten = torch.ops.aten

# Their other operand, if it is this number, changes nothing.
_NEUTRAL: dict[Any, int] = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Metadata assertions go; aliases, copies and identities give way to their operand.

    BEFORE  _assert_tensor_metadata(x); y = _to_copy(x: f32[B,T,d], dtype=f32); z = mul(y, 1.0); use(z)
    AFTER   use(x)

    A copy is an identity only when the dtype stays; reshapes, expands and slices count when the shape stays; `add 0`
    and `mul 1` when the dtype stays. Memory layout is not considered: the passes use `reshape`, which takes any.
    """

    name: ClassVar[str] = "remove-noops"
    ensures = (absent(*ASSERTIONS, *COPIES),)

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in [each for each in ir.graph.nodes if each.op == "call_function"]:
            if node.target in ASSERTIONS:
                ir.graph.erase_node(node)
            elif is_identity(node) or _is_neutral(node):
                ir.replace(node, node.all_input_nodes[0])
            else:
                continue
            rewrites += 1
        return rewrites


def _is_neutral(node: Node) -> bool:
    if node.target is aten.slice.Tensor:
        return same_type(node, node.args[0])
    if node.target not in _NEUTRAL:
        return False
    x, other = arguments(node).self, arguments(node).other
    number = isinstance(other, (int, float)) and not isinstance(other, bool) and isinstance(x, Node)
    return number and other == _NEUTRAL[node.target] and same_type(node, x)
