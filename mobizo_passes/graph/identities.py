"""Calls that compute nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mobizo_passes.graph.nodes import arguments, val

aten = torch.ops.aten

ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
)
# Identities where dtype and shape stay.
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)


def is_identity(node: Node) -> bool:
    """Whether a call gives its first argument back, memory layout aside: copies, same-shape views, inactive dropout."""
    if node.target in COPIES:
        return True
    if node.target is aten.dropout.default:
        return not arguments(node).train or arguments(node).p == 0.0
    return node.target in (*_CASTS, *_VIEWS) and same_type(node, node.args[0])


def same_type(node: Node, other: Any) -> bool:
    """Whether two nodes compute tensors of the same dtype and shape."""
    return val(node).dtype == val(other).dtype and val(node).shape == val(other).shape
