"""Which overload a call means that does not name one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

# Stands for every tensor: two elements, so that it is never taken for a number.
_TENSOR = torch.empty(2)


def resolve(packet: OpOverloadPacket, args: Sequence[Any], kwargs: Mapping[str, Any]) -> OpOverload | None:
    """Return the overload that torch takes for these arguments, None if none fits; nodes are tensors.

    Only the kinds of the arguments count, not their values, dtypes or shapes. An operator with one overload that writes
    into no argument has no choice: it is returned whatever the arguments are.
    """
    only = _only(packet)
    if only is not None:
        return only
    return _resolve(packet, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()))


@functools.cache
def _only(packet: OpOverloadPacket) -> OpOverload | None:
    found: list[OpOverload] = [getattr(packet, name) for name in packet.overloads()]
    found = [each for each in found if not any(a.is_out for a in each._schema.arguments)]
    return found[0] if len(found) == 1 else None


@functools.cache
def _resolve(packet: OpOverloadPacket, args: Any, kwargs: Any) -> OpOverload | None:
    given = [_example(each) for each in args], {name: _example(each) for name, each in kwargs}
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *given[0], **given[1])
    except RuntimeError:
        return None
    return getattr(packet, name)


def _kind(value: Any) -> Any:
    """What matters of an argument, as something that can be hashed."""
    if isinstance(value, fx.Node):
        return fx.Node
    if isinstance(value, list | tuple):
        return (list, *dict.fromkeys(map(_kind, value)))
    if isinstance(value, bool | int | float | complex | str):
        return type(value)
    return value


def _example(kind: Any) -> Any:
    if kind is fx.Node:
        return _TENSOR
    if isinstance(kind, tuple):
        return [_example(each) for each in kind[1:]]
    return kind(1) if isinstance(kind, type) else kind
