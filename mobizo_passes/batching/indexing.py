"""Rules for operators that select elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layout, rule
from mobizo_passes.batching.shapes import common, source
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.nodes import arguments, positive_dim, set_arguments

aten = torch.ops.aten

PAIRS = (
    "; of pairs, let each half be an input of its own and concatenate them in forward, or let the two of a pair stand "
    "side by side and take them apart by x[::2] and x[1::2]"
)


@rule(aten.slice.Tensor)
def slice_(batcher: Batcher, node: fx.Node) -> Layout:
    x, layout, shape = source(batcher, node)
    given = arguments(node)
    if positive_dim(given.dim, len(shape)) != layout.dim:
        return layout
    start, end, step = slice(given.start, given.end, given.step).indices(shape[layout.dim])
    inner = shape[layout.dim] // layout.outer
    if step > 1 and start < step and not inner % step and len(range(start, end, step)) == shape[layout.dim] // step:
        # One row of every `step`, as pairs that lie side by side are taken apart: the same in each group.
        node.args = (x, given.dim, start, 2**63 - 1, step)
        return layout
    if step != 1 or start % inner or end % inner or end <= start:
        raise batcher.refuse(node, f"it takes a part of the batch dimension{PAIRS}")
    if end - start == shape[layout.dim]:
        node.args = (x, given.dim, 0, 2**63 - 1)
        return layout
    # Whole blocks of the batch, each with its groups.
    node.args = (x, given.dim, start * batcher.groups, end * batcher.groups)
    return Layout(layout.dim, (end - start) // inner)


@rule(
    aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
)  # fmt: skip
def split(batcher: Batcher, node: fx.Node) -> tuple[Layout, ...]:
    """Along the batch, whole blocks of it may be taken apart again."""
    x, layout, shape = source(batcher, node)
    parts = batcher.plain[node]
    dim = positive_dim(arguments(node).dim, len(shape))
    if dim != layout.dim:
        return (layout,) * len(parts)
    sizes, inner = [part.shape[dim] for part in parts], shape[dim] // layout.outer
    if any(size % inner or not size for size in sizes):
        raise batcher.refuse(node, f"it splits the batch dimension{PAIRS}")
    node.target, node.kwargs = aten.split_with_sizes.default, {}
    node.args = (x, [size * batcher.groups for size in sizes], dim)
    return tuple(Layout(dim, size // inner) for size in sizes)


@rule(aten.gather.default)
def gather(batcher: Batcher, node: fx.Node) -> Layout:
    given = arguments(node)
    x, index = given.self, given.index
    layout = batcher.layout(x) or batcher.layout(index)
    ndim = batcher.plain[node].dim()
    if layout is None or positive_dim(given.dim, ndim) == layout.dim:
        raise batcher.refuse(node, "it gathers along the batch dimension")
    moved = {batcher.layout(a) for a in (x, index)} - {None, layout}
    if moved or batcher.shape(x)[layout.dim] != batcher.shape(index)[layout.dim]:
        raise batcher.unsupported(node, "its index and its input hold different batches")
    set_arguments(node, self=batcher.fuse(x, layout), index=batcher.fuse(index, layout))
    return layout


@rule(aten.embedding.default)
def embedding(batcher: Batcher, node: fx.Node) -> Layout:
    layout = batcher.layout(node.args[1])
    if layout is None or batcher.layout(node.args[0]) is not None:
        raise batcher.unsupported(node, "the embedding table is perturbed")
    return layout


@rule(aten.index_select.default)
def index_select(batcher: Batcher, node: fx.Node) -> Layout:
    operands: list[Any] = list(node.args)
    x, dim, index = operands
    at = positive_dim(dim, len(batcher.shape(x)))
    selected = batcher.layout(index)
    if batcher.layout(x) is None and selected is not None:
        # A table that all groups share, read at perturbed rows.
        return Layout(at, selected.outer)
    x, layout, shape = source(batcher, node)
    if selected is not None:
        raise batcher.unsupported(node, "its input and its index are both perturbed")
    if at != layout.dim:
        return layout
    if layout.outer != 1:
        raise batcher.unsupported(node, "it selects rows of a batch that is not outermost in its dimension")
    node.args = (x, dim, offset_rows(batcher, index, Layout(0), shape[layout.dim]))
    return layout


@rule(aten.index.Tensor)
def index(batcher: Batcher, node: fx.Node) -> Layout:
    """Advanced indexing. An index into the batch dimension counts rows of one group: each group adds its offset."""
    operands: list[Any] = list(node.args)
    x, indices = operands[0], list(operands[1])
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(indices[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in used):
        raise batcher.unsupported(node, "a boolean index selects a data-dependent set")
    rank = max(indices[d].meta["val"].dim() for d in used)
    front = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    perturbed = any(batcher.layout(indices[d]) is not None for d in used)
    layout, shape = batcher.layout(x), batcher.shape(x)
    if perturbed and layout is not None and layout.dim not in used:
        raise batcher.unsupported(node, "its input and its index are both perturbed, and it pairs no rows of the batch")
    if layout is not None and layout.dim not in used:
        before = sum(d not in used for d in range(layout.dim))
        passed = rank if front < layout.dim or (front == 0 and used[0] != 0) else 0
        return Layout(before + passed, layout.outer)
    if layout is not None:
        if layout.outer != 1:
            raise batcher.unsupported(node, "it indexes a batch that is not outermost in its dimension")
        rows = indices[layout.dim]
        if not batcher.shape(rows):
            raise batcher.refuse(node, "it takes one example out of the batch dimension")
        if batcher.layout(rows) is None:
            # Put the groups where the row index varies; broadcast dimensions count from the right.
            shape_of = batcher.shape(rows)
            back = next((d - len(shape_of) for d, size in enumerate(shape_of) if size > 1), -len(shape_of))
            rows = _from_the_front(batcher, rows, shape[layout.dim])
            rows = batcher.fuse(rows, Layout(len(shape_of) + back))
            batcher.layouts[rows], batcher.plain[rows] = Layout(len(shape_of) + back), indices[layout.dim].meta["val"]
        indices[layout.dim] = rows
    at, fused = batcher.align(node, [indices[d] for d in used], rank)
    for d, operand in zip(used, fused, strict=True):
        indices[d] = operand
    if layout is not None:
        rows = indices[layout.dim]
        indices[layout.dim] = offset_rows(batcher, rows, batcher.layout(rows) or at, shape[layout.dim])
    node.args = (x, indices)
    return Layout(front + at.dim, at.outer)


@rule(aten.scatter.value, aten.scatter.src, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(batcher: Batcher, node: fx.Node) -> Layout:
    """Writes along a dimension that does not hold the batch; every operand is brought to the same layout."""
    operands: list[Any] = list(node.args)
    tensors = [a for a in (operands[0], *operands[2:]) if isinstance(a, fx.Node)]
    layout = common(batcher, node, tensors)
    if positive_dim(operands[1], len(batcher.shape(operands[2]))) == layout.dim:
        raise batcher.refuse(node, "it writes along the batch dimension")
    if len({batcher.shape(t)[layout.dim] for t in tensors}) != 1:
        raise batcher.unsupported(node, "its index and its input hold different batches")
    node.args = tuple(batcher.fuse(a, layout) if isinstance(a, fx.Node) else a for a in operands)
    return layout


@rule(aten.index_put.default)
def index_put(batcher: Batcher, node: fx.Node) -> Layout:
    """``x[..., i, ...] = values`` with one list of positions, the same for all examples, along another dimension."""
    operands: list[Any] = list(node.args)
    x, indices, values = operands[:3]
    used = [d for d, i in enumerate(indices) if i is not None]
    masks = [d for d in used if indices[d].meta["val"].dtype in (torch.bool, torch.uint8)]
    if masks:
        raise batcher.unsupported(node, f"values are written where a perturbed mask is true; {THROUGH_A_MASK}")
    at, count = used[0], len(batcher.shape(x))
    if len(used) != 1 or indices[at].meta["val"].dim() != 1 or batcher.layout(indices[at]) is not None:
        raise batcher.unsupported(node, "it writes at more than one list of positions, or at perturbed ones")
    if values.meta["val"].dim() != count:
        raise batcher.unsupported(node, "the values that it writes broadcast over dimensions")
    layout = common(batcher, node, [x, values])
    if layout.dim == at:
        raise batcher.refuse(node, "it writes along the batch dimension")
    if batcher.shape(values)[layout.dim] != batcher.shape(x)[layout.dim]:
        raise batcher.unsupported(node, "the values that it writes broadcast over the batch")
    node.args = (batcher.fuse(x, layout), indices, batcher.fuse(values, layout), *operands[3:])
    return layout


THROUGH_A_MASK = (
    "which value comes where depends on the masks of all examples before. With features [B, n, D], mask [B, T] and "
    "embeddings [B, T, D] write: at = (mask.cumsum(1) - 1).clamp(0, n - 1)[..., None].expand(-1, -1, D); "
    "torch.where(mask[..., None], features.gather(1, at), embeddings)"
)


@rule(aten.masked_scatter.default)
def masked_scatter(batcher: Batcher, node: fx.Node) -> Layout:
    raise batcher.unsupported(node, f"values are written where a perturbed mask is true; {THROUGH_A_MASK}")


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(batcher: Batcher, node: fx.Node) -> Layout:
    operands: list[Any] = list(node.args)
    x, dim, index, values = operands
    if batcher.layout(index) is not None:
        raise batcher.unsupported(node, "its index is perturbed")
    layout = common(batcher, node, [x, values])
    if positive_dim(dim, batcher.plain[node].dim()) == layout.dim:
        raise batcher.refuse(node, "it writes along the batch dimension")
    node.args = (batcher.fuse(x, layout), dim, index, batcher.fuse(values, layout))
    return layout


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def write_part(batcher: Batcher, node: fx.Node) -> Layout:
    """Replaces a part of the first operand, along a dimension that does not hold the batch."""
    given = arguments(node)
    whole, part = given.self, given.src
    dim = positive_dim(given.dim, batcher.plain[node].dim())
    lost = node.target is aten.select_scatter.default
    layout = batcher.layout(whole)
    if layout is None:
        inside: Any = batcher.layout(part)
        layout = Layout(inside.dim + (lost and dim <= inside.dim), inside.outer)
    if dim == layout.dim:
        raise batcher.refuse(node, "it replaces a part of the batch dimension")
    within = Layout(layout.dim - (lost and dim < layout.dim), layout.outer)
    if batcher.layout(part) not in (None, within):
        raise batcher.refuse(node, "its operands hold the batch in different dimensions")
    set_arguments(node, self=batcher.fuse(whole, layout), src=batcher.fuse(part, within))
    return layout


def _from_the_front(batcher: Batcher, rows: fx.Node, count: int) -> fx.Node:
    """Row -1 is the last of its group, not of the fused batch: count from the front before adding offsets."""
    if rows.op == "placeholder" and role(rows).kind == "constant":
        value = batcher.ir.state[role(rows).name]
        if not bool((value < 0).any()):
            return rows
    return batcher.ir.call(aten.remainder.Scalar, rows, count, like=rows)


def offset_rows(batcher: Batcher, rows: fx.Node, layout: Layout, count: int) -> fx.Node:
    """Row numbers within one group -> row numbers within the fused batch: group g adds ``g * count``."""
    fused = batcher.fuse(rows, layout)
    value = fused.meta["val"]
    per_group = value.shape[layout.dim] // batcher.groups
    offsets = (torch.arange(batcher.groups) * count).repeat_interleave(per_group).to(value.dtype)
    offsets = offsets.reshape([-1 if d == layout.dim else 1 for d in range(value.dim())])
    constant = batcher.ir.add_constant("group_offsets", offsets)
    return batcher.ir.call(aten.add.Tensor, fused, constant, like=rows)


@rule(torch.ops.mobizo.gather_rows.default)
def gather_rows(batcher: Batcher, node: fx.Node) -> Layout:
    x, index = arguments(node).x, arguments(node).index
    layout = common(batcher, node, [x, index])
    if layout.dim != 0:
        raise batcher.unsupported(node, "it expects the batch in dimension 0")
    node.args = (batcher.fuse(x, layout), batcher.fuse(index, layout))
    return layout
