"""Rules for operators that compute: products, attention, normalizations, reductions, convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mobizo_passes.batching.batcher import Batcher, Layout, pointwise, rule
from mobizo_passes.batching.shapes import only_first, source
from mobizo_passes.graph.nodes import arguments, set_arguments

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(batcher: Batcher, node: fx.Node) -> Layout:
    layout, shape = only_first(batcher, node)
    if layout.dim == len(shape) - 1:
        raise batcher.refuse(node, "it contracts the batch dimension")
    return layout


@rule(torch.ops.mobizo.mp_lora.default)
def mp_lora(batcher: Batcher, node: fx.Node) -> Layout:
    """The site itself: its weight already holds one factor per group; only its input is fused here."""
    given = arguments(node)
    layout = batcher.layout(given.x) or Layout(given.dim, given.outer)
    if layout.dim == len(batcher.shape(given.x)) - 1:
        raise batcher.refuse(node, "it contracts the batch dimension")
    set_arguments(node, x=batcher.fuse(given.x, layout), dim=layout.dim, outer=layout.outer)
    return layout


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
def matmul(batcher: Batcher, node: fx.Node) -> Layout:
    operands: list[Any] = list(node.args)
    a, b = operands
    layout, fused = product(batcher, node, a, b, batcher.plain[node].dim())
    node.args = tuple(fused)
    return layout


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(batcher: Batcher, node: fx.Node) -> Layout:
    operands: list[Any] = list(node.args)
    bias, a, b = operands
    ndim = batcher.plain[node].dim()
    layout, fused = product(batcher, node, a, b, ndim)
    shape = batcher.shape(bias)
    dim = layout.dim - (ndim - len(shape))
    if batcher.layout(bias) is not None or (dim >= 0 and shape[dim] != 1):
        bias = batcher.fuse(bias, Layout(dim, layout.outer))
        if batcher.layout(bias) not in (None, Layout(dim, layout.outer)):
            raise batcher.refuse(node, "its operands hold the batch in different dimensions")
    node.args = (bias, *fused)
    return layout


def product(batcher: Batcher, node: fx.Node, a: fx.Node, b: fx.Node, ndim: int) -> tuple[Layout, list[fx.Node]]:
    """Matrix product [..., M, K] x [..., K, N]: groups in batch dimensions, in M of a alone, or in N of b alone."""
    la, lb = batcher.layout(a), batcher.layout(b)
    na, nb = len(batcher.shape(a)), len(batcher.shape(b))
    # A vector operand takes part in no batch dimension, and the product has one dimension less.
    if nb == 1 and lb is None and la is not None and la.dim < na - 1:
        return la, [a, b]
    if na == 1 and la is None and lb is not None and lb.dim < nb - 2:
        return lb, [a, b]
    batch_a = la is not None and la.dim < na - 2
    batch_b = lb is not None and lb.dim < nb - 2
    if (batch_a or la is None) and (batch_b or lb is None):
        layout, fused = batcher.align(node, [a, b], ndim)
        return layout, fused
    if la is not None and lb is None and na >= 2 and la.dim == na - 2:
        if nb > 2 and na < nb:
            raise batcher.unsupported(node, "its shared operand broadcasts over more dimensions")
        return Layout(ndim - (2 if nb > 1 else 1), la.outer), [a, b]
    if lb is not None and la is None and nb >= 2 and lb.dim == nb - 1:
        return Layout(ndim - 1, lb.outer), [a, b]
    raise batcher.refuse(node, "it multiplies examples of the batch with one another")


@rule(aten.scaled_dot_product_attention.default)
def attention(batcher: Batcher, node: fx.Node) -> Layout:
    """[.., heads, T, d]: any of query, key, value may be perturbed; the others are expanded to match."""
    given = arguments(node)
    if given.dropout_p:
        raise batcher.unsupported(node, "it has dropout; call model.eval() before transform")
    tensors = [given.query, given.key, given.value]
    ndim = batcher.plain[node].dim()
    if any((lay := batcher.layout(t)) is not None and lay.dim >= ndim - 2 for t in tensors):
        raise batcher.refuse(node, "it attends across the batch dimension")
    layout, fused = batcher.align(node, [*tensors, given.attn_mask], ndim)
    set_arguments(node, **dict(zip(("query", "key", "value", "attn_mask"), fused, strict=True)))
    return layout


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def batch_norm(batcher: Batcher, node: fx.Node) -> Layout | tuple[Layout | None, ...]:
    layout, _ = only_first(batcher, node)
    if node.target is aten.batch_norm.default and arguments(node).training:
        raise batcher.refuse(node, "BatchNorm in training mode normalizes over the batch; call model.eval()")
    if layout.dim == 1:
        raise batcher.refuse(node, "its channels hold the batch")
    return layout if node.target is aten.batch_norm.default else (layout, None, None)


@rule(aten._native_batch_norm_legit.no_stats, aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
def batch_statistics(batcher: Batcher, node: fx.Node) -> tuple[Layout, Layout, Layout]:
    """Normalizes each channel over the batch; instance norm folds the batch into the channels, which keeps it whole."""
    operands: list[Any] = list(node.args)
    x, layout, _ = source(batcher, node)
    if layout.dim != 1:
        raise batcher.refuse(
            node, "BatchNorm without running statistics normalizes over the batch; use GroupNorm or LayerNorm"
        )
    channels = Layout(0, layout.outer)
    node.args = (x, *(batcher.fuse(a, channels) if isinstance(a, fx.Node) else a for a in operands[1:]))
    return layout, channels, channels


@rule(aten.log_sigmoid_forward.default)
def log_sigmoid(batcher: Batcher, node: fx.Node) -> tuple[Layout, Layout | None]:
    _, layout, _ = source(batcher, node)
    # The second result is for a backward pass; on some devices it is empty.
    return layout, layout if batcher.plain[node][1].numel() else None


@rule(aten._cdist_forward.default)
def distances(batcher: Batcher, node: fx.Node) -> Layout:
    """[..., P, M] against [..., R, M] -> [..., P, R]: as a product whose second operand is transposed."""
    operands: list[Any] = list(node.args)
    a, b, *rest = operands
    ndim = batcher.plain[node].dim()
    la, lb = batcher.layout(a), batcher.layout(b)
    if la is not None and lb is None and la.dim == len(batcher.shape(a)) - 2 and len(batcher.shape(b)) <= 2:
        return Layout(ndim - 2, la.outer)
    if lb is not None and la is None and lb.dim == len(batcher.shape(b)) - 2 and len(batcher.shape(a)) <= 2:
        return Layout(ndim - 1, lb.outer)
    if any(lay is not None and lay.dim >= len(batcher.shape(x)) - 2 for x, lay in ((a, la), (b, lb))):
        raise batcher.refuse(node, "it measures distances between examples of the batch")
    layout, fused = batcher.align(node, [a, b], ndim)
    node.args = (*fused, *rest)
    return layout


@rule(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, aten.group_norm.default,
    aten.conv1d.padding, aten.conv2d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.pixel_shuffle.default,
)  # fmt: skip
def leading(batcher: Batcher, node: fx.Node) -> Layout:
    """Operators whose dimension 0 is a batch of independent examples."""
    layout, _ = only_first(batcher, node)
    if layout.dim != 0:
        raise batcher.refuse(node, "it mixes the dimension that holds the batch")
    return layout


@rule(
    aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
    aten.binary_cross_entropy_with_logits.default, aten.binary_cross_entropy.default, aten.soft_margin_loss.default,
    aten.kl_div.default,
)  # fmt: skip
def elementwise_loss(batcher: Batcher, node: fx.Node) -> Layout:
    """Per-element loss; a shared target is expanded. With a reduction it gives no batch dimension to keep."""
    if batcher.plain[node].dim() == 0:
        raise batcher.refuse(node, "it reduces over the batch and is not the loss output")
    return pointwise(batcher, node)


@rule(aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default)
def token_loss(batcher: Batcher, node: fx.Node) -> Layout:
    """Per-element loss (reduction none) of [N, classes] logits; shared scores or targets are expanded."""
    given = arguments(node)
    scores, target = given.self, given.target
    layout = batcher.layout(scores) or batcher.layout(target)
    moved = {batcher.layout(a) for a in (scores, target)} - {None, layout}
    if layout is None or moved or layout.dim != 0:
        raise batcher.unsupported(node, "it expects scores and targets with the batch in dimension 0")
    if batcher.layout(given.weight) is not None:
        raise batcher.unsupported(node, "its class weights are perturbed")
    if given.reduction != 0:
        raise batcher.refuse(node, "it reduces over the batch and is not the loss output")
    set_arguments(node, self=batcher.fuse(scores, layout), target=batcher.fuse(target, layout))
    return layout


@rule(torch.ops.mobizo.reduce_loss.default)
def reduce_loss(batcher: Batcher, node: fx.Node) -> Layout:
    """One loss per group: the only operator that may reduce over the batch."""
    given = arguments(node)
    layout = batcher.layout(given.values)
    if layout is None or batcher.layout(given.weights) is not None:
        raise batcher.unsupported(node, "the weights of the loss are perturbed, not its values")
    set_arguments(node, groups=batcher.groups, dim=layout.dim, outer=layout.outer)
    return Layout(0)
