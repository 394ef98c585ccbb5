"""The body of a method in half precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from lowering.executorch_compat.tags import tag_like
from lowering.targets.partitions import downstream, upstream
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten
_LARGEST = torch.finfo(torch.float16).max

# One half-precision copy of each weight for all methods: that is how the file holds it once.
_copies: Any = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class NarrowBody(Pass):
    """What is computed from the first product to the last is float16, and so are its weights and embedding tables.

    BEFORE  y: f32[N,o] = linear(x: f32[N,d], w: f32[o,d]);                  p = _softmax(y)
    AFTER   y: f16[N,o] = linear(_to_copy(x, dtype=f16), w: f16[o,d]);       p = _softmax(_to_copy(y, dtype=f32))

    Noise, perturbed tensors, losses and the update stay in float32: rounded, a step would not be what `apply` repeats.
    Constants beyond what a half holds become the largest number that it does.
    """

    name: ClassVar[str] = "narrow-body"

    def rewrite(self, ir: Ir) -> int:
        calls = [node for node in ir.graph.nodes if node.op == "call_function"]
        products = {node for node in calls if node_flops(node) and _is_wide(node)}
        after, before = downstream(calls, products), upstream(calls, products)
        body = [node for node in calls if _is_wide(node) and (node in products or (node in after and node in before))]
        found = ir.find(aten.embedding.default)
        tables = [node for node in found if ir.is_constant(arguments(node).weight) and _is_wide(node)]
        inside = {*body, *tables}
        for source in _sources(inside):
            readers = [node for node in [*tables, *body] if source in node.all_input_nodes]
            if ir.is_constant(source):
                narrow = _narrowed_constant(ir, source, all(user in inside for user in source.users))
            else:
                with ir.before(min(readers)):
                    narrow = ir.call(aten._to_copy.default, source, dtype=torch.float16)
            for reader in readers if narrow is not source else ():
                reader.replace_input_with(source, narrow)
        for node in calls:
            if node in inside:
                node.args, node.kwargs = pytree.tree_map_only(torch.dtype, _narrow_dtype, (node.args, node.kwargs))
                ir.refresh(node)
                self._widen(ir, node, inside)
        return len(inside)

    def _widen(self, ir: Ir, node: Node, inside: set[Node]) -> None:
        """Give those who read the node from outside its value in float32 again."""
        if all(user in inside for user in node.users):
            return
        with ir.before(node.next):
            wide = ir.call(aten._to_copy.default, node, dtype=torch.float32)
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide and user not in inside)


def _sources(inside: set[Node]) -> Iterable[Node]:
    """What nodes inside read in float32 and what is not inside, in order."""
    found = {source for node in inside for source in node.all_input_nodes if source not in inside and _is_wide(source)}
    return sorted(found)


def _narrowed_constant(ir: Ir, node: Node, alone: bool) -> Node:
    value = ir.constant_value(node)
    if value not in _copies:
        _copies[value] = value.detach().clamp(-_LARGEST, _LARGEST).half()
    if alone:
        ir.store(node, _copies[value])
        return node
    own = ir.add_constant(f"{role(node).name}_half", _copies[value])
    tag_like(own, [node])
    return own


def _is_wide(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and val(node).dtype == torch.float32


def _narrow_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float32 else dtype
