"""Rules for operators that move or regroup elements without computing."""

from __future__ import annotations

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layout, pointwise, rule

aten = torch.ops.aten

for _target in (
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.copy.default,
    aten.hardswish.default,
    aten.empty_like.default,
    aten.fill.Scalar,
    aten._prelu_kernel.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
):
    rule(_target)(pointwise)


def normalized(dim: int, ndim: int) -> int:
    """Return a non-negative dimension."""
    return dim % ndim if ndim else 0


def _source(batcher: Batcher, node: fx.Node) -> tuple[fx.Node, Layout, tuple[int, ...]]:
    x = node.args[0]
    layout = batcher.layout(x)
    if not isinstance(x, fx.Node) or layout is None:
        raise batcher.unsupported(node, "its first argument is shared while another is perturbed")
    return x, layout, batcher.shape(x)


source = _source


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.view_as.default, aten._reshape_copy.default,
)  # fmt: skip
def reshape(batcher: Batcher, node: fx.Node) -> Layout:
    """[B, T, D] -> [B*T, D] and the like, with the groups' size in the result."""
    x, layout, shape = _source(batcher, node)
    new = list(batcher.plain[node].shape)
    result = batcher.reshaped(node, shape, layout, new)
    new[result.dim] *= batcher.groups
    node.target, node.args, node.kwargs = aten.reshape.default, (x, new), {}
    return result


@rule(aten.unsqueeze.default)
def unsqueeze(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    dim = normalized(node.args[1], len(shape) + 1)  # type: ignore[arg-type]
    return Layout(layout.dim + (dim <= layout.dim), layout.outer)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(batcher: Batcher, node: fx.Node) -> Layout:
    x, layout, shape = _source(batcher, node)
    wanted = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    wanted = [wanted] if isinstance(wanted, int) else wanted
    gone = sorted(d for d in {normalized(w, len(shape)) for w in wanted} if shape[d] == 1)  # type: ignore[union-attr]
    if layout.dim in gone:
        raise batcher.unsupported(node, "it removes the batch dimension of a batch of one")
    node.target, node.args = aten.squeeze.dims, (x, gone)
    return Layout(layout.dim - sum(d < layout.dim for d in gone), layout.outer)


@rule(aten.permute.default)
def permute(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    order = [normalized(d, len(shape)) for d in node.args[1]]  # type: ignore[union-attr]
    return Layout(order.index(layout.dim), layout.outer)


@rule(aten.transpose.int, aten.t.default, aten.swapaxes.default, aten.numpy_T.default)
def transpose(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    a, b = (normalized(d, len(shape)) for d in node.args[1:]) if len(node.args) > 1 else (0, len(shape) - 1)  # type: ignore[arg-type]
    return Layout({a: b, b: a}.get(layout.dim, layout.dim), layout.outer)


@rule(aten.tril.default, aten.triu.default)
def triangle(batcher: Batcher, node: fx.Node) -> Layout:
    """Keeps one side of the diagonal of the last two dimensions."""
    _, layout, shape = _source(batcher, node)
    if layout.dim >= len(shape) - 2:
        raise batcher.refuse(node, "it cuts a triangle across the batch dimension")
    return layout


@rule(aten.expand.default)
def expand(batcher: Batcher, node: fx.Node) -> Layout:
    x, layout, shape = _source(batcher, node)
    new = list(batcher.plain[node].shape)
    dim = layout.dim + len(new) - len(shape)
    if new[dim] != shape[layout.dim]:
        raise batcher.unsupported(node, "it broadcasts the batch dimension")
    new[dim] *= batcher.groups
    node.args = (x, new)
    return Layout(dim, layout.outer)


@rule(aten.repeat.default)
def repeat(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    times: list[int] = list(node.args[1])  # type: ignore[arg-type]
    dim = layout.dim + len(times) - len(shape)
    if times[dim] != 1:
        raise batcher.unsupported(node, "it repeats the batch dimension")
    return Layout(dim, layout.outer)


@rule(aten.cat.default)
def cat(batcher: Batcher, node: fx.Node) -> Layout:
    tensors: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    ndim = batcher.plain[node].dim()
    layout = common(batcher, node, tensors)
    if normalized(node.args[1] if len(node.args) > 1 else 0, ndim) == layout.dim:  # type: ignore[arg-type]
        raise batcher.refuse(node, "it concatenates along the batch dimension")
    node.args = ([batcher.fuse(t, layout) for t in tensors], *node.args[1:])
    return layout


@rule(aten.stack.default)
def stack(batcher: Batcher, node: fx.Node) -> Layout:
    tensors: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    layout = common(batcher, node, tensors)
    dim = normalized(node.args[1] if len(node.args) > 1 else 0, batcher.plain[node].dim())  # type: ignore[arg-type]
    node.args = ([batcher.fuse(t, layout) for t in tensors], *node.args[1:])
    return Layout(layout.dim + (dim <= layout.dim), layout.outer)


def common(batcher: Batcher, node: fx.Node, tensors: list[fx.Node]) -> Layout:
    """Return the one layout that the perturbed operands share; raises the refusal if they differ."""
    layouts = {lay for t in tensors if (lay := batcher.layout(t))}
    if len(layouts) != 1:
        raise batcher.refuse(node, "its operands hold the batch in different dimensions")
    return layouts.pop()


@rule(aten.flip.default)
def flip(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    if layout.dim in {normalized(d, len(shape)) for d in node.args[1]}:  # type: ignore[union-attr]
        raise batcher.refuse(node, "it reorders the batch dimension")
    return layout


@rule(aten.diagonal.default)
def diagonal(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    operands: list[int] = [0, 0, 1]
    operands[: len(node.args) - 1] = node.args[1:]  # type: ignore[assignment]
    gone = {normalized(d, len(shape)) for d in operands[1:]}
    if layout.dim in gone:
        raise batcher.refuse(node, "it pairs examples of the batch with positions")
    return Layout(layout.dim - sum(d < layout.dim for d in gone), layout.outer)


@rule(aten.roll.default)
def roll(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    dims: list[int] = list(node.args[2]) if len(node.args) > 2 else []  # type: ignore[arg-type]
    if not dims or layout.dim in {normalized(d, len(shape)) for d in dims}:
        raise batcher.refuse(node, "it shifts the batch dimension")
    return layout


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(batcher: Batcher, node: fx.Node) -> Layout:
    _, layout, shape = _source(batcher, node)
    amounts: list[int] = list(node.args[1])  # type: ignore[arg-type]
    back = len(shape) - 1 - layout.dim
    if any(amounts[2 * back : 2 * back + 2]):
        raise batcher.refuse(node, "it pads the batch dimension")
    return layout


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def factory(batcher: Batcher, node: fx.Node) -> None:
    """Reads no values of its argument: the result stays shared."""
    return
