"""Rules for operators that pick elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .lifter import Layout, Lifter, rule
from .shapes import normalized, source

aten = torch.ops.aten


@rule(aten.slice.Tensor)
def slice_(lift: Lifter, node: fx.Node) -> Layout:
    x, layout, shape = source(lift, node)
    dim, start, end, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    if normalized(dim, len(shape)) != layout.dim:  # type: ignore[arg-type]
        return layout
    whole = (start or 0) == 0 and (end is None or end >= shape[layout.dim]) and step == 1  # type: ignore[operator]
    if not whole:
        raise lift.refuse(node, "it takes a part of the batch dimension")
    node.args = (x, dim, 0, 2**63 - 1)
    return layout


@rule(aten.select.int)
def select(lift: Lifter, node: fx.Node) -> Layout:
    _, layout, shape = source(lift, node)
    dim = normalized(node.args[1], len(shape))  # type: ignore[arg-type]
    if dim == layout.dim:
        raise lift.refuse(node, "it takes one example out of the batch dimension")
    return Layout(layout.dim - (dim < layout.dim), layout.outer)


@rule(aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(lift: Lifter, node: fx.Node) -> tuple[Layout, ...]:
    _, layout, shape = source(lift, node)
    at = 1 if node.target is aten.unbind.int else 2
    dim = normalized(node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0), len(shape))  # type: ignore[arg-type]
    if dim == layout.dim:
        raise lift.refuse(node, "it splits the batch dimension")
    if node.target is aten.unbind.int:
        layout = Layout(layout.dim - (dim < layout.dim), layout.outer)
    return (layout,) * len(lift.plain[node])


@rule(aten.gather.default)
def gather(lift: Lifter, node: fx.Node) -> Layout:
    operands: list[Any] = list(node.args)
    x, dim, index = operands[:3]
    layout = lift.layout(x) or lift.layout(index)
    ndim = lift.plain[node].dim()
    if layout is None or normalized(dim, ndim) == layout.dim:
        raise lift.refuse(node, "it gathers along the batch dimension")
    moved = {lift.layout(a) for a in (x, index)} - {None, layout}
    if moved or lift.shape(x)[layout.dim] != lift.shape(index)[layout.dim]:
        raise lift.unsupported(node, "its index and its input hold different batches")
    node.args = (lift.fuse(x, layout), dim, lift.fuse(index, layout), *operands[3:])
    return layout


@rule(aten.embedding.default)
def embedding(lift: Lifter, node: fx.Node) -> Layout:
    layout = lift.layout(node.args[1])
    if layout is None or lift.layout(node.args[0]) is not None:
        raise lift.unsupported(node, "the embedding table is perturbed")
    return layout


@rule(aten.index_select.default)
def index_select(lift: Lifter, node: fx.Node) -> Layout:
    x, layout, shape = source(lift, node)
    dim, index = node.args[1], node.args[2]
    if lift.layout(index) is not None:
        raise lift.unsupported(node, "its index is perturbed")
    if normalized(dim, len(shape)) != layout.dim:  # type: ignore[arg-type]
        return layout
    if layout.outer != 1:
        raise lift.unsupported(node, "it picks rows of a batch that is not outermost in its dimension")
    node.args = (x, dim, offset_rows(lift, index, Layout(0), shape[layout.dim]))  # type: ignore[arg-type]
    return layout


@rule(aten.index.Tensor)
def index(lift: Lifter, node: fx.Node) -> Layout:
    """Advanced indexing. An index into the batch dimension counts rows of one group: each group adds its offset."""
    x, layout, shape = source(lift, node)
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    if any(lift.layout(i) is not None for i in indices) or any(
        i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices
    ):
        raise lift.unsupported(node, "a perturbed or boolean index selects a data-dependent set")
    used = [d for d, i in enumerate(indices) if i is not None]
    rank = max(indices[d].meta["val"].dim() for d in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    front = used[0] if adjacent else 0
    if layout.dim not in used:
        kept_before = [d for d in range(layout.dim) if d not in used]
        passed = rank if not adjacent or front < layout.dim else 0
        return Layout(len(kept_before) + passed, layout.outer)
    if layout.outer != 1:
        raise lift.unsupported(node, "it indexes a batch that is not outermost in its dimension")
    rows = indices[layout.dim]
    row_shape = lift.shape(rows)
    if not row_shape:
        raise lift.refuse(node, "it takes one example out of the batch dimension")
    # Put the groups where the row index varies; broadcast dimensions count from the right.
    back = next((d - len(row_shape) for d, size in enumerate(row_shape) if size > 1), -len(row_shape))
    extent = row_shape[back]
    for d in used:
        size = lift.shape(indices[d])
        if d != layout.dim and len(size) >= -back and size[back] > 1:
            if size[back] != extent:
                raise lift.unsupported(node, "its row index broadcasts against another index")
            indices[d] = lift.fuse(indices[d], Layout(len(size) + back))
    rows = _from_the_front(lift, rows, shape[layout.dim])
    indices[layout.dim] = offset_rows(lift, rows, Layout(len(row_shape) + back), shape[layout.dim])
    node.args = (x, indices)
    return Layout(front + rank + back)


def _from_the_front(lift: Lifter, rows: fx.Node, count: int) -> fx.Node:
    """Row -1 is the last of its group, not of the fused batch: count from the front before adding offsets."""
    if rows.op == "placeholder" and rows.meta["input"].kind == "constant":
        value = lift.ir.state[rows.meta["input"].name]
        if not bool((value < 0).any()):
            return rows
    return lift.ir.call(aten.remainder.Scalar, rows, count, like=rows)


def offset_rows(lift: Lifter, rows: fx.Node, layout: Layout, count: int) -> fx.Node:
    """Row numbers within one group -> row numbers within the fused batch: group g adds ``g * count``."""
    fused = lift.fuse(rows, layout)
    value = fused.meta["val"]
    per_group = value.shape[layout.dim] // lift.groups
    offsets = (torch.arange(lift.groups) * count).repeat_interleave(per_group).to(value.dtype)
    offsets = offsets.reshape([-1 if d == layout.dim else 1 for d in range(value.dim())])
    constant = lift.ir.add_constant("group_offsets", offsets)
    return lift.ir.call(aten.add.Tensor, fused, constant, like=rows)


@rule(torch.ops.mobizo.pick.default)
def pick(lift: Lifter, node: fx.Node) -> Layout:
    x, layout, _ = source(lift, node)
    if layout != Layout(0) or lift.layout(node.args[1]) is not None:
        raise lift.unsupported(node, "it expects the batch in dimension 0 and shared labels")
    node.args = (x, lift.fuse(node.args[1], layout))  # type: ignore[arg-type]
    return layout
