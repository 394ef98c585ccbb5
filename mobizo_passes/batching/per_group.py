"""Rules for values that differ per group and hold no batch: perturbed weights, and what is computed from them alone.

Such a value is stacked, ``[P, *shape]``. Where it meets the batch, the result is fused again: a product with it is
`mobizo::mp_lora`, a convolution `mobizo::mp_conv`, a look-up reads a table of P tables, an element-wise operator
broadcasts it along the groups; anything else runs once per group under `torch.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.batching.batcher import (
    PER_GROUP,
    RULES,
    Batcher,
    Layout,
    Layouts,
    pointwise,
)
from mobizo_passes.batching.indexing import offset_rows
from mobizo_passes.graph.facts import note
from mobizo_passes.graph.inline import OperatorCall, inline_all
from mobizo_passes.graph.nodes import arguments, named

aten = torch.ops.aten
mobizo = torch.ops.mobizo

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def per_group(batcher: Batcher, node: fx.Node) -> Layouts:
    """Batch a node that reads at least one per-group value."""
    note(node, expanded=True)
    if not any(batcher.batched(arg) for arg in node.all_input_nodes):
        return _run_alone(batcher, node)
    if node.target in _MEETINGS and (layouts := _MEETINGS[node.target](batcher, node)) is not None:
        return layouts
    if node._erased:
        return None
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if RULES.get(node.target) is pointwise or (node.target not in RULES and is_pointwise):
        return _broadcast(batcher, node)
    return _run_each(batcher, node)


def _run_alone(batcher: Batcher, node: fx.Node) -> None:
    """No batch in sight: one result per group."""
    results = _vmapped(batcher, node, {})
    batcher.replace(node, results, [PER_GROUP] * len(results))


def _run_each(batcher: Batcher, node: fx.Node) -> None:
    """Take the groups out of the batch, run the operator on each, weave them in where the operator's own rule says."""
    shared = {a: batcher.place(a) for a in node.all_input_nodes if batcher.batched(a) and a not in batcher.layouts}
    fused: dict[fx.Node, fx.Node] = {}
    for arg, layout in shared.items():
        fused[arg] = new = batcher.fuse(arg, layout)
        batcher.layouts[new], batcher.plain[new] = layout, batcher.plain.get(arg, arg.meta["val"])
    before = node.args, node.kwargs, node.target
    stacked = [a for a in node.all_input_nodes if batcher.per_group(a)]
    # Where the batch lies in the result does not depend on the values of a weight: ask as if it were shared.
    held = {arg: arg.meta["val"] for arg in stacked}
    for arg in stacked:
        del batcher.layouts[arg]
        arg.meta["val"] = batcher.plain.get(arg, held[arg])
    try:
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), lambda a: fused.get(a, a))
        found = batcher.ordinary(node)
    finally:
        for arg, value in held.items():
            batcher.layouts[arg], arg.meta["val"] = PER_GROUP, value
    node.args, node.kwargs, node.target = before
    ungrouped: dict[fx.Node, fx.Node] = {}
    for arg in node.all_input_nodes:
        layout = batcher.layout(arg)
        if layout is not None:
            ungrouped[arg] = batcher.ir.call(
                mobizo.ungroup.default, arg, batcher.groups, layout.dim, layout.outer, like=node
            )
    results = _vmapped(batcher, node, ungrouped)
    layouts = list(found) if isinstance(found, tuple) else [found]
    plain = batcher.plain[node]
    shapes = [v.shape for v in plain] if isinstance(plain, tuple | list) else [plain.shape]
    woven, places = [], []
    for value, at, shape in zip(results, layouts, shapes, strict=True):
        # A statistic beside the result is left as it is, one per group.
        fits = isinstance(at, Layout)
        woven.append(
            batcher.ir.call(mobizo.regroup.default, value, at.dim, at.outer, shape[at.dim], like=node)
            if fits
            else value
        )
        places.append(at if fits else PER_GROUP)
    batcher.replace(node, woven, places)


@dataclass(frozen=True)
class _Vmapped:
    """A call under `torch.vmap` over the leading dimension of the operands in the places `stacked`."""

    call: OperatorCall
    stacked: tuple[int, ...]

    def __call__(self, *values: Any) -> Any:
        def one(*parts: Tensor) -> Any:
            given = list(values)
            for i, part in zip(self.stacked, parts, strict=True):
                given[i] = part
            return self.call(*given)

        return torch.vmap(one)(*(values[i] for i in self.stacked))


def _vmapped(batcher: Batcher, node: fx.Node, ungrouped: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Insert the operator under `torch.vmap` over the leading dimension of its stacked operands."""
    call, leaves = OperatorCall.of(node)
    operands = [ungrouped.get(a, a) if isinstance(a, fx.Node) else a for a in leaves]
    stacked = [i for i, a in enumerate(leaves) if isinstance(a, fx.Node) and (a in ungrouped or batcher.per_group(a))]
    try:
        return inline_all(batcher.ir, _Vmapped(call, tuple(stacked)), operands, node)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise batcher.unsupported(node, f"it does not run on one perturbed weight per group: {reason}") from error


def _broadcast(batcher: Batcher, node: fx.Node) -> Layouts:
    """Element-wise: bring every per-group operand to the layout of the batch, then go on as usual."""
    anchor = next(a for a in node.all_input_nodes if batcher.batched(a))
    place, shape = batcher.place(anchor), batcher.shape(anchor)
    back, size = place.dim - len(shape), shape[place.dim]

    def spread(arg: Any) -> Any:
        if not batcher.per_group(arg):
            return arg
        plain = list(batcher.shape(arg))
        missing = -back - len(plain)
        if missing > 0:
            plain = [1] * missing + plain
            arg = batcher.ir.call(aten.reshape.default, arg, [batcher.groups, *plain], like=node)
        dim = len(plain) + back
        if plain[dim] not in (1, size):
            raise batcher.refuse(node, f"a batch of {size} broadcasts against {plain[dim]} along one dimension")
        new = batcher.ir.call(mobizo.regroup.default, arg, dim, place.outer, size, like=node)
        plain[dim] = size
        with batcher.ir.fake:
            batcher.plain[new] = new.meta["val"].new_empty(plain)
        batcher.layouts[new] = Layout(dim, place.outer)
        note(new, expanded=True)
        return new

    node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), spread)
    return batcher.ordinary(node)


# Where a per-group value meets the batch -----------------------------------------------------------------------------


def _product(
    batcher: Batcher, node: fx.Node, x: fx.Node, weight: fx.Node, transposed: bool, bias: fx.Node | None
) -> Layouts:
    """``x @ weight + bias`` as `mp_lora`; None if the operands are no batch and matrix."""
    if not batcher.batched(x) or not batcher.per_group(weight) or len(batcher.shape(x)) < 2:
        return None
    layout, shape = batcher.place(x), batcher.shape(weight)
    if layout.dim == len(batcher.shape(x)) - 1 or any(n != 1 for n in shape[:-2]) or len(shape) < 2:
        return None
    if len(shape) > 2:
        weight = batcher.ir.call(aten.reshape.default, weight, [batcher.groups, *shape[-2:]], like=node)
    new = batcher.ir.call(
        mobizo.mp_lora.default, batcher.fuse(x, layout), weight, layout.dim, layout.outer, transposed, like=node
    )
    if bias is None:
        batcher.replace(node, [new], [layout])
        return None
    note(new, expanded=True)
    batcher.layouts[new], batcher.plain[new] = layout, batcher.plain[node]
    node.target, node.args, node.kwargs = aten.add.Tensor, (new, bias), {}
    return _broadcast(batcher, node) if batcher.per_group(bias) else batcher.ordinary(node)


def _linear(batcher: Batcher, node: fx.Node) -> Layouts:
    given = arguments(node)
    return _product(batcher, node, given.input, given.weight, False, given.bias)


def _matmul(batcher: Batcher, node: fx.Node) -> Layouts:
    operands: list[Any] = list(node.args)
    return _product(batcher, node, operands[0], operands[1], True, None)


def _addmm(batcher: Batcher, node: fx.Node) -> Layouts:
    given = arguments(node)
    return None if node.kwargs else _product(batcher, node, given.mat1, given.mat2, True, given.self)


def _convolution(batcher: Batcher, node: fx.Node) -> Layouts:
    """The groups become channel groups of one convolution."""
    x, weight, bias, *options = named(node.target, node.args, node.kwargs).values()
    if not batcher.batched(x) or not batcher.per_group(weight) or bias is not None:
        return None
    layout = batcher.place(x)
    if layout != Layout(0):
        return None
    new = batcher.ir.call(mobizo.mp_conv.default, batcher.fuse(x, layout), weight, *options, like=node)
    batcher.replace(node, [new], [layout])
    return None


def _embedding(batcher: Batcher, node: fx.Node) -> Layouts:
    """A look-up in the stack of all tables: group g reads at ``g * rows + id``."""
    table, ids = arguments(node).weight, arguments(node).indices
    if not batcher.per_group(table) or not batcher.batched(ids) or batcher.place(ids).outer != 1:
        return None
    rows, width = batcher.shape(table)
    layout = batcher.place(ids)
    flat = batcher.ir.call(aten.reshape.default, table, [batcher.groups * rows, width], like=node)
    node.args = (flat, offset_rows(batcher, ids, layout, rows))
    return layout


_MEETINGS: dict[Any, Callable[[Batcher, fx.Node], Layouts]] = {
    aten.linear.default: _linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
    aten.addmm.default: _addmm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    aten.embedding.default: _embedding,
}
