"""What an operator says of itself: its schema, its name, whether it writes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node


def schema_of(target: Any) -> Any | None:
    """The schema of an operator of ATen, of our own or of an ExecuTorch dialect; None for what has none (`getitem`)."""
    return getattr(target, "_schema", None) or getattr(getattr(target, "_op", None), "_schema", None)


def operation_name(node: Node) -> str:
    """`"linear"`, `"bmm"`, ... without namespace and overload, for ATen, edge and out-variant operators alike."""
    schema = schema_of(node.target)
    name = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return name.split("::")[-1]


def overload_name(node: Node) -> str:
    """`"aten.linear.default"`: the operator with its namespace and overload, dialects left out."""
    schema = schema_of(node.target)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def is_functional(target: Any) -> bool:
    """Whether a call of `target` is one of an operator that writes to none of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and not writes(target)


def writes(target: Any) -> bool:
    """Whether a call of `target` is one of an operator that writes to an argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
