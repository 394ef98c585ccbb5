"""Rules for operators that move or regroup elements without computing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layout, pointwise, rule
from mobizo_passes.graph.nodes import arguments, positive_dim, set_arguments

aten = torch.ops.aten

# Element-wise, though torch does not tag them so.
rule(
    aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default,
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.copy.default, aten.hardswish.default, aten.empty_like.default, aten.fill.Scalar,
    aten._prelu_kernel.default, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf,
)(pointwise)  # fmt: skip


def source(batcher: Batcher, node: fx.Node) -> tuple[fx.Node, Layout, tuple[int, ...]]:
    """Return the first argument, its layout and its plain shape; raises the refusal if it is shared."""
    x = node.args[0]
    layout = batcher.layout(x)
    if not isinstance(x, fx.Node) or layout is None:
        raise batcher.unsupported(node, "its first argument is shared while another is perturbed")
    return x, layout, batcher.shape(x)


def only_first(batcher: Batcher, node: fx.Node) -> tuple[Layout, tuple[int, ...]]:
    """Return the first argument's layout and plain shape; the other operands (weights, statistics) must be shared."""
    x, layout, shape = source(batcher, node)
    if any(batcher.layout(n) is not None for n in node.all_input_nodes if n is not x):
        raise batcher.unsupported(node, "a weight or statistic of it is perturbed")
    return layout, shape


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default, aten._reshape_copy.default,
)  # fmt: skip
def reshape(batcher: Batcher, node: fx.Node) -> Layout:
    """[B, T, D] -> [B*T, D] and the like, with the groups' size in the result."""
    x, layout, shape = source(batcher, node)
    new = list(batcher.plain[node].shape)
    result = batcher.reshaped(node, shape, layout, new)
    new[result.dim] *= batcher.groups
    node.target, node.args, node.kwargs = aten.reshape.default, (x, new), {}
    return result


@rule(aten.unsqueeze.default)
def unsqueeze(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = source(batcher, node)
    dim = positive_dim(arguments(node).dim, len(shape) + 1)
    return Layout(layout.dim + (dim <= layout.dim), layout.outer)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(batcher: Batcher, node: fx.Node) -> Layout:
    x, layout, shape = source(batcher, node)
    wanted = arguments(node).get("dim", range(len(shape)))
    wanted = [wanted] if isinstance(wanted, int) else wanted
    gone = sorted(d for d in {positive_dim(w, len(shape)) for w in wanted} if shape[d] == 1)
    if layout.dim in gone:
        raise batcher.unsupported(node, "it removes the batch dimension of a batch of one")
    node.target, node.args = aten.squeeze.dims, (x, gone)
    return Layout(layout.dim - sum(d < layout.dim for d in gone), layout.outer)


@rule(aten.permute.default)
def permute(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = source(batcher, node)
    order = [positive_dim(d, len(shape)) for d in arguments(node).dims]
    return Layout(order.index(layout.dim), layout.outer)


@rule(aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.numpy_T.default)
def transpose(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = source(batcher, node)
    dims: Any = node.args[1:] or (0, -1)
    a, b = (positive_dim(dim, len(shape)) for dim in dims)
    return Layout({a: b, b: a}.get(layout.dim, layout.dim), layout.outer)


@rule(aten.expand.default)
def expand(batcher: Batcher, node: fx.Node) -> Layout:
    x, layout, shape = source(batcher, node)
    new = list(batcher.plain[node].shape)
    dim = layout.dim + len(new) - len(shape)
    if new[dim] != shape[layout.dim]:
        raise batcher.unsupported(node, "it broadcasts the batch dimension")
    new[dim] *= batcher.groups
    node.args = (x, new)
    return Layout(dim, layout.outer)


@rule(aten.repeat.default)
def repeat(batcher: Batcher, node: fx.Node) -> Layout:
    """Along the batch, whole copies of it lie one after another, as each expert's of all tokens."""
    _, layout, shape = source(batcher, node)
    times = arguments(node).repeats
    dim = layout.dim + len(times) - len(shape)
    return Layout(dim, layout.outer * times[dim])


@rule(aten.cat.default)
def cat(batcher: Batcher, node: fx.Node) -> Layout:
    """Along the batch, blocks of it come to lie one after another: chosen and rejected answers, in one forward."""
    given = arguments(node)
    dim = positive_dim(given.dim, batcher.plain[node].dim())
    found = {lay for t in given.tensors if (lay := batcher.layout(t))}
    if {lay.dim for lay in found} == {dim}:
        return _blocks(batcher, node, dim)
    layout = common(batcher, node, given.tensors)
    set_arguments(node, tensors=[batcher.fuse(t, layout) for t in given.tensors])
    return layout


def _blocks(batcher: Batcher, node: fx.Node, dim: int) -> Layout:
    tensors: list[fx.Node] = arguments(node).tensors
    if not all(batcher.batched(t) and batcher.place(t).dim == dim for t in tensors):
        raise batcher.refuse(node, "it concatenates the batch with what is no batch")
    places = [batcher.place(t) for t in tensors]
    if len({batcher.shape(t)[dim] // place.outer for t, place in zip(tensors, places, strict=True)}) != 1:
        raise batcher.refuse(node, "it concatenates batches of different sizes")
    set_arguments(node, tensors=[batcher.fuse(t, place) for t, place in zip(tensors, places, strict=True)])
    return Layout(dim, sum(place.outer for place in places))


@rule(aten.stack.default)
def stack(batcher: Batcher, node: fx.Node) -> Layout:
    given = arguments(node)
    layout = common(batcher, node, given.tensors)
    dim = positive_dim(given.dim, batcher.plain[node].dim())
    set_arguments(node, tensors=[batcher.fuse(t, layout) for t in given.tensors])
    return Layout(layout.dim + (dim <= layout.dim), layout.outer)


def common(batcher: Batcher, node: fx.Node, tensors: list[fx.Node]) -> Layout:
    """Return the one layout that the perturbed operands share; raises the refusal if they differ."""
    layouts = {lay for t in tensors if (lay := batcher.layout(t))}
    if len(layouts) != 1:
        raise batcher.refuse(node, "its operands hold the batch in different dimensions")
    return layouts.pop()


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = source(batcher, node)
    amounts = arguments(node).pad
    back = len(shape) - 1 - layout.dim
    if any(amounts[2 * back : 2 * back + 2]):
        raise batcher.refuse(node, "it pads the batch dimension")
    return layout


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def factory(batcher: Batcher, node: fx.Node) -> None:
    """Reads no values of its argument: the result stays shared."""
    return
