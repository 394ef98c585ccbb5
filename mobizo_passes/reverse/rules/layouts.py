"""Operators that move elements without changing them: the cotangent moves the other way."""

from __future__ import annotations

import torch

from mobizo_passes.reverse.table import ELEMENTWISE, WHOLE, Call, NoRule, Piece, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def _permuted(n: Call, g: Value) -> Value:
    back = [0] * len(n.dims)
    for to, dim in enumerate(n.dims):
        back[dim % len(back)] = to
    return g.permute(back)


def _swapped(n: Call, g: Value) -> Value:
    a, b = (n.arguments[name] for name in ("dim0", "dim1") if name in n.arguments) if "dim0" in n.arguments else (0, -1)
    return g.transpose(a, b) if len(g.shape) > 1 else g


def _pieces(n: Call, g: Value) -> list[Value]:
    dim, at, parts = n.dim % len(g.shape), 0, []
    for each in n.tensors:
        parts.append(g.narrow(dim, at, each.shape[dim]))
        at += each.shape[dim]
    return parts


def _layers(n: Call, g: Value) -> list[Value]:
    dim = n.dim % len(g.shape)
    return [g.narrow(dim, i, 1).reshape(each.shape) for i, each in enumerate(n.tensors)]


def _slice(n: Call, g: Value) -> Piece | Value:
    dim = n.dim % len(n.self.shape)
    size = n.self.shape[dim]
    if n.step != 1:
        zeros = n.tape.full(n.self.shape, 0.0, g.dtype)
        return zeros.call(aten.slice_scatter.default, g, dim, n.start, n.end, n.step)
    start = 0 if n.start is None else n.start
    return Piece(dim, min(max(start + size if start < 0 else start, 0), size), g)


def _select(n: Call, g: Value) -> Piece:
    dim = n.dim % len(n.self.shape)
    return Piece(dim, n.index % n.self.shape[dim], g.unsqueeze(dim))


def _split(n: Call, g: Value) -> Piece:
    """One of the results of `split`, `chunk` and their like."""
    dim = n.dim % len(n.self.shape)
    sizes = [part.shape[dim] for part in n.node.meta["val"]]
    return Piece(dim, sum(sizes[: n.place]), g)


def _unbind(n: Call, g: Value) -> Piece:
    dim = n.dim % len(n.self.shape)
    return Piece(dim, n.place, g.unsqueeze(dim))


def _padded(n: Call, g: Value) -> Value:
    if n.arguments.get("mode", "constant") != "constant":
        raise NoRule(f"of padding by '{n.mode}'")
    pad, rank = list(n.pad), len(g.shape)
    for i in range(len(pad) // 2):
        dim = rank - 1 - i
        if min(pad[2 * i : 2 * i + 2]) < 0:
            raise NoRule("of padding by a negative number")
        g = g.narrow(dim, pad[2 * i], n.self.shape[dim])
    return g


def _repeated(n: Call, g: Value) -> Value:
    repeats = list(n.repeats)
    shape = [*[1] * (len(repeats) - len(n.self.shape)), *n.self.shape]
    apart = g.reshape([size for pair in zip(repeats, shape, strict=True) for size in pair])
    summed = apart.sum([2 * i for i, times in enumerate(repeats) if times != 1], keepdim=True)
    return summed.reshape(n.self.shape)


def _interleaved(n: Call, g: Value) -> Value:
    dim = n.dim % len(n.self.shape)
    shape = n.self.shape
    return g.reshape([*shape[: dim + 1], n.repeats, *shape[dim + 1 :]]).sum([dim + 1])


def _again(n: Call, g: Value) -> Value:
    """An operator that keeps some entries keeps the same of the cotangent."""
    return g.call(n.node.target, *n.node.args[1:])


_RESHAPES = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten._reshape_copy.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default,
)  # fmt: skip
rows(WHOLE, _RESHAPES, self=lambda n, g: g.reshape(n.self.shape))
rows(WHOLE, aten.permute.default, self=_permuted)
rows(WHOLE, (aten.transpose.int, aten.t.default, aten.swapaxes.default), self=_swapped)
rows(ELEMENTWISE, aten.expand.default, self=lambda n, g: g)
rows(WHOLE, aten.repeat.default, self=_repeated)
rows(WHOLE, aten.repeat_interleave.self_int, self=_interleaved)
rows(WHOLE, aten.cat.default, tensors=_pieces)
rows(WHOLE, aten.stack.default, tensors=_layers)
rows(WHOLE, aten.slice.Tensor, self=_slice)
rows(WHOLE, aten.select.int, self=_select)
rows(
    WHOLE,
    (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor),
    self=_split,
)
rows(WHOLE, aten.unbind.int, self=_unbind)
rows(WHOLE, (aten.pad.default, aten.constant_pad_nd.default), self=_padded)
rows(WHOLE, (aten.flip.default, aten.tril.default, aten.triu.default), self=_again)
rows(WHOLE, aten.roll.default, self=lambda n, g: g.call(aten.roll.default, [-shift for shift in n.shifts], n.dims))
