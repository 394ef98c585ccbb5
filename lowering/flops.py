"""Floating-point operations of the matmul-like nodes of a graph (what decides where a step's time goes)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from lowering.executorch_compat.operators import schema_of


def operation_name(node: Node) -> str:
    """`"linear"`, `"bmm"`, ... without namespace and overload, for ATen, edge and out-variant operators alike."""
    target: Any = node.target
    schema = schema_of(target)
    name = schema.name if schema is not None else getattr(target, "__name__", str(target))
    return name.split("::")[-1]


def overload_name(node: Node) -> str:
    """`"aten.linear.default"`: the operator with its namespace and overload, dialects left out."""
    target: Any = node.target
    schema = schema_of(target)
    if schema is None:
        return getattr(target, "__name__", str(target))
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def flops_of(node: Node) -> int:
    """Multiplications and additions of `linear`, `mm`, `addmm`, `bmm`, `matmul`, convolution and attention; else 0.

    An unfused attention counts its two products. Shapes are taken from `meta["val"]`.
    """
    if node.op != "call_function":
        return 0
    name = operation_name(node)
    out = node.meta.get("val")
    if not isinstance(out, torch.Tensor):
        return 0
    if name in ("linear", "mm", "bmm", "matmul"):
        return 2 * math.prod(out.shape) * _shape(node, 0)[-1]
    if name == "addmm":
        return 2 * math.prod(out.shape) * _shape(node, 1)[-1]
    if name in ("convolution", "conv1d", "conv2d"):
        return 2 * math.prod(out.shape) * math.prod(_shape(node, 1)[1:])
    if name == "scaled_dot_product_attention":
        query, key, value = _shape(node, 0), _shape(node, 1), _shape(node, 2)
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _shape(node: Node, index: int) -> tuple[int, ...]:
    source: Any = node.args[index]
    return tuple(source.meta["val"].shape)
