"""Remove operations that compute nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from lowering.editor import ProgramEditor
from mobizo_passes.graph.nodes import arguments, shape_of, val

aten = torch.ops.aten

_CHECKS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
_ALIASES = (aten.alias.default, aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default)
_COPIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
)


@dataclass(frozen=True)
class RemoveNoops:
    """Metadata assertions go; aliases, copies and identities give way to their operand.

    BEFORE  _assert_tensor_metadata(x); y = _to_copy(x: f32[B,T,d], dtype=f32); z = mul(y, 1.0); use(z)
    AFTER   use(x)

    A copy is an identity only when dtype and device stay; reshapes and expands count when the shape stays; `add 0`
    and `mul 1` when the dtype stays. Memory layout is not considered: the passes use `reshape`, which takes any.
    """

    name: str = "remove-noops"

    def __call__(self, editor: ProgramEditor) -> int:
        rewrites = 0
        for node in editor.find(*_CHECKS):
            editor.graph.erase_node(node)
            rewrites += 1
        for node in editor.find(*_ALIASES, *_COPIES, *_SHAPED, *_ARITHMETIC, aten.dropout.default):
            if _is_identity(node):
                editor.replace(node, node.args[0])  # pyright: ignore[reportArgumentType]
                rewrites += 1
        return rewrites


_SHAPED = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.slice.Tensor,
)
_ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def _is_identity(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    if val(source).dtype != val(node).dtype or shape_of(source) != shape_of(node):
        return False
    if node.target in _COPIES or node.target in _ALIASES:
        return val(source).device == val(node).device
    if node.target in _SHAPED:
        return True
    if node.target is aten.dropout.default:
        return not arguments(node).train or arguments(node).p == 0.0
    neutral = 0 if node.target in (aten.add.Tensor, aten.sub.Tensor) else 1
    other = node.args[1]
    return isinstance(other, (int, float)) and not isinstance(other, bool) and other == neutral
