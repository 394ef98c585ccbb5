"""Compute with the two parts of complex numbers, which no target knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import FUNCTIONAL, Pass

aten = torch.ops.aten

Parts = tuple[Any, Any]
"""Real and imaginary part: nodes, or numbers."""

# What moves elements does to each part what it does to the whole.
_MOVES = (
    aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int,
    aten.slice.Tensor, aten.transpose.int, aten.permute.default, aten.expand.default, aten.index.Tensor,
    aten.index_select.default, aten.cat.default, aten.stack.default, aten.neg.default, aten.detach.default,
)  # fmt: skip
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_ENDS = (aten.view_as_real.default, aten.real.default, aten.imag.default, aten.abs.default)


@dataclass(frozen=True)
class SplitComplex(Pass):
    """Write rotations by complex numbers (rotary embeddings as Llama's authors write them) with real ones.

    BEFORE  %z: c64[4, 8] = aten.view_as_complex(%x);  %r: c64[4, 8] = aten.mul(%z, %f)
            %y: f32[4, 8, 2] = aten.view_as_real(%r)
    AFTER   %a: f32[4, 8] = aten.select(%x, -1, 0);  %b: f32[4, 8] = aten.select(%x, -1, 1)
            %y: f32[4, 8, 2] = aten.stack([%a * %f_real - %b * %f_imag, %a * %f_imag + %b * %f_real], -1)

    Complex numbers that reach another operator, such as a Fourier transform, are left alone.
    """

    name: ClassVar[str] = "split-complex"
    requires = (FUNCTIONAL,)

    def rewrite(self, ir: Ir) -> int:
        taken = _taken(ir)
        parts: dict[fx.Node, Parts] = {}
        for node in taken:
            if node.op == "placeholder":
                value, name = ir.constant_value(node), role(node).name
                parts[node] = (
                    ir.add_constant(f"{name}_real", value.real.contiguous()),
                    ir.add_constant(f"{name}_imag", value.imag.contiguous()),
                )
                continue
            with ir.before(node):
                found = _split(ir, node, parts)
            if isinstance(found, tuple):
                parts[node] = found
            else:
                ir.replace(node, found)
        return len(taken)


def _taken(ir: Ir) -> list[fx.Node]:
    """The nodes, in order, that read or give complex numbers and can be written without; each brings its neighbors."""
    taken = {n for n in ir.graph.nodes if _known(ir, n)}
    while True:
        lost = {
            node
            for node in taken
            if any(_complex(each) and each not in taken for each in node.all_input_nodes)
            or (_complex(node) and any(user not in taken for user in node.users))
        }
        if not lost:
            return [node for node in ir.graph.nodes if node in taken]
        taken -= lost


def _known(ir: Ir, node: fx.Node) -> bool:
    if node.op != "call_function":
        return _complex(node) and ir.is_constant(node)
    if not _complex(node):
        return node.target in _ENDS and any(map(_complex, node.all_input_nodes))
    if node.target in (*_SUMS, aten.cat.default, aten.stack.default):
        return all(_complex(each) for each in node.all_input_nodes) and not node.kwargs
    return node.target in (*_MOVES, *_STARTS, aten.mul.Tensor)


def _complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def _split(ir: Ir, node: fx.Node, parts: dict[fx.Node, Parts]) -> Parts | fx.Node:
    target: Any = node.target
    operands: list[Any] = list(node.args)
    if target in _STARTS:
        return _STARTS[target](ir, *operands)
    if target is aten.mul.Tensor:
        return _product(ir, *(parts.get(x, x) if isinstance(x, fx.Node) else x for x in operands))
    each: Any = [fx.map_arg((node.args, node.kwargs), lambda n, i=i: parts[n][i] if n in parts else n) for i in (0, 1)]
    (real, _), (imag, _) = each
    if target is aten.view_as_real.default:
        return ir.call(aten.stack.default, [real[0], imag[0]], -1)
    if target is aten.abs.default:
        return ir.call(aten.linalg_vector_norm.default, ir.call(aten.stack.default, [real[0], imag[0]], -1), 2, [-1])
    if target in _ENDS:
        return real[0] if target is aten.real.default else imag[0]
    first, second = (ir.call(target, *args, **kwargs) for args, kwargs in each)
    return first, second


def _product(ir: Ir, left: Any, right: Any) -> Parts:
    def times(a: Any, b: Any) -> fx.Node:
        return ir.call(aten.mul.Tensor, *((a, b) if isinstance(a, fx.Node) else (b, a)))

    if isinstance(left, complex):
        left = (left.real, left.imag)
    if isinstance(right, complex):
        right = (right.real, right.imag)
    if not isinstance(left, tuple):
        left, right = right, left
    if not isinstance(right, tuple):
        return times(left[0], right), times(left[1], right)
    real = ir.call(aten.sub.Tensor, times(left[0], right[0]), times(left[1], right[1]))
    return real, ir.call(aten.add.Tensor, times(left[0], right[1]), times(left[1], right[0]))


def _from_pairs(ir: Ir, x: Any) -> Parts:
    return ir.call(aten.select.int, x, -1, 0), ir.call(aten.select.int, x, -1, 1)


def _from_polar(ir: Ir, length: Any, angle: Any) -> Parts:
    turned = (ir.call(each, angle) for each in (aten.cos.default, aten.sin.default))
    real, imag = (ir.call(aten.mul.Tensor, length, each) for each in turned)
    return real, imag


_STARTS: dict[Any, Callable[..., Parts]] = {
    aten.view_as_complex.default: _from_pairs,
    aten.polar.default: _from_polar,
    aten.complex.default: lambda ir, real, imag: (real, imag),
}
