"""What torch and ExecuTorch's edge dialect know of an operator, beyond what they document."""

from __future__ import annotations

from typing import Any

import torch


def schema_of(target: Any) -> Any | None:
    """The schema of an ATen, edge or out-variant operator; None for what is none, such as `getitem`."""
    return getattr(target, "_schema", None) or getattr(getattr(target, "_op", None), "_schema", None)


def is_functional(target: Any) -> bool:
    """Whether a call of `target` is one of an ATen operator that writes to none of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and not writes(target)


def writes(target: Any) -> bool:
    """Whether a call of `target` is one of an ATen operator that writes to an argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
