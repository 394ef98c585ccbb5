"""Normalizations as one operator each."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, is_float, shape_of, val
from mobizo_passes.graph.passes import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseNorms(Pass):
    """An RMS norm written out becomes `rms_norm`; both norms work on rows and have constant weights.

    BEFORE  y = x * rsqrt(mean(x * x, -1, keepdim) + eps)                  x: f32[N,T,d]; or pow(x, 2)
    AFTER   y = reshape(rms_norm(reshape(x, [N*T,d]), [d], ones: f32[d], eps), [N,T,d])

    BEFORE  y = layer_norm(x: f32[N,T,d], [d], None, None, eps)
    AFTER   y = reshape(getitem(native_layer_norm(reshape(x, [N*T,d]), [d], ones: f32[d], zeros: f32[d], eps), 0), ...)

    Halves end at 65504: squared on an NPU, activations above 256 are infinite and the result is zero. The operators
    compute inside with more range. Rows, because QNN's RMS norm gives wrong numbers from the ninth matrix of a [N,T,d]
    on. A norm over more than the last axis, or with a weight that is not constant, is left alone.
    """

    name: ClassVar[str] = "fuse-norms"

    def rewrite(self, ir: Ir) -> int:
        rewrites = 0
        for node in ir.find(aten.mul.Tensor):
            found = written_out(node)
            if found is None:
                continue
            x, eps = found
            with ir.before(node):
                _replace_rms(ir, node, x, None, eps)
            rewrites += 1
        for node in ir.find(aten.layer_norm.default, aten.rms_norm.default):
            if _ready(node) or len(arguments(node).normalized_shape) != 1 or not is_float(node):
                continue
            given = arguments(node)
            weight, bias = given.weight, given.get("bias")
            if not all(each is None or ir.is_constant(each) for each in (weight, bias)):
                continue
            with ir.before(node):
                if node.target is aten.layer_norm.default:
                    _replace_layer(ir, node, weight, bias)
                else:
                    _replace_rms(ir, node, given.input, weight, given.eps)
            rewrites += 1
        return rewrites


def _ready(node: Node) -> bool:
    given = len(node.args) == 4 and None not in node.args
    return node.target is aten.rms_norm.default and len(shape_of(node)) == 2 and given


def _replace_rms(ir: Ir, node: Node, x: Any, weight: Node | None, eps: float | None) -> None:
    size = shape_of(x)[-1]
    weight = _constant(ir, size, 1.0, val(x).dtype) if weight is None else weight
    eps = torch.finfo(val(x).dtype).eps if eps is None else eps
    whole = ir.call(aten.rms_norm.default, _rows(ir, x), [size], weight, eps)
    ir.replace(node, ir.reshape(whole, shape_of(node)))


def _replace_layer(ir: Ir, node: Node, weight: Node | None, bias: Node | None) -> None:
    x: Any = node.args[0]
    size, dtype = shape_of(x)[-1], val(x).dtype
    weight = _constant(ir, size, 1.0, dtype) if weight is None else weight
    bias = _constant(ir, size, 0.0, dtype) if bias is None else bias
    eps = arguments(node).eps
    whole = ir.call(aten.native_layer_norm.default, _rows(ir, x), [size], weight, bias, eps)
    ir.replace(node, ir.reshape(ir.call(operator.getitem, whole, 0), shape_of(node)))


def _rows(ir: Ir, x: Any) -> Node:
    return ir.reshape(x, [math.prod(shape_of(x)[:-1]), shape_of(x)[-1]])


def _constant(ir: Ir, size: int, value: float, dtype: torch.dtype) -> Node:
    return ir.add_constant("norm", torch.full((size,), value, dtype=dtype), ("norm", size, value, dtype))


def written_out(node: Node) -> tuple[Node, float] | None:
    """x and eps when `node` is x * rsqrt(mean(x²) + eps) over the last axis."""
    pairs: Any = (node.args[:2], node.args[1::-1])
    for x, root in pairs:
        found = reciprocal_root(root) if isinstance(root, Node) else None
        if found is not None and found[0] is x:
            return found
    return None


def reciprocal_root(root: Node) -> tuple[Node, float] | None:
    """x and eps when `root` is rsqrt(mean(x²) + eps) over the last axis, which is kept."""
    total: Any = root.args[0] if _is(root, aten.rsqrt.default) else None
    if not _is(total, aten.add.Tensor) or not isinstance(total.args[1], (int, float)) or total.kwargs:
        return None
    mean: Any = total.args[0]
    if not _is(mean, aten.mean.dim) or not arguments(mean).keepdim or mean.kwargs.get("dtype"):
        return None
    square: Any = mean.args[0]
    x: Any = square.args[0] if _is(square, aten.mul.Tensor) or _is(square, aten.pow.Tensor_Scalar) else None
    if not isinstance(x, Node) or square.args[1] not in ((x,) if _is(square, aten.mul.Tensor) else (2,)):
        return None
    whole = list(mean.args[1]) in ([-1], [len(shape_of(x)) - 1])
    return (x, float(total.args[1])) if whole and is_float(x) else None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target
