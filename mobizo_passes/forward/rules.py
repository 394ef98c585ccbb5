"""The rows of the table, by what the operators do."""

from __future__ import annotations

from typing import Any

import torch

from mobizo_passes.forward.table import Tangents, flat, linear, own, product, scaled
from mobizo_passes.reverse.rules.losses import takes
from mobizo_passes.reverse.rules.reductions import kept, reduced
from mobizo_passes.reverse.table import RULES, Call, NoRule
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten
mobizo = torch.ops.mobizo

# Layouts and selections -----------------------------------------------------------------------------------------------
linear((
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten._reshape_copy.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.swapaxes.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor, aten.unbind.int,
    aten.flip.default, aten.roll.default, aten.tril.default, aten.triu.default,
    aten.gather.default, aten.index_select.default, aten.index.Tensor,
), "self")  # fmt: skip
linear((aten.cat.default, aten.stack.default), "tensors")
linear(aten.constant_pad_nd.default, "self", value=0)
linear(mobizo.gather_rows.default, "x")
linear(aten.index_put.default, "self", "values")
linear(aten.scatter.value, "self", value=0)
linear((aten.scatter.src, aten.scatter_add.default, aten.slice_scatter.default, aten.select_scatter.default),
       "self", "src")  # fmt: skip

# Sums and averages ----------------------------------------------------------------------------------------------------
linear((
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.cumsum.default,
    aten.avg_pool1d.default, aten.avg_pool2d.default,
), "self")  # fmt: skip
linear(mobizo.reduce_loss.default, "values")

# Products -------------------------------------------------------------------------------------------------------------
_CONVOLUTIONS = (
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
)  # fmt: skip
product(aten.linear.default, "input", "weight", added="bias")
product(aten.matmul.default, "self", "other")
product((aten.mm.default, aten.bmm.default), "self", "mat2")
product(aten.mv.default, "self", "vec")
product(_CONVOLUTIONS, "input", "weight", added="bias")

# A fixed scale for each channel ---------------------------------------------------------------------------------------
scaled((aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), "input")

# What does not change -------------------------------------------------------------------------------------------------
flat(aten.argmax.default, aten.argmin.default)


def _padded(n: Call, t: Tangents) -> Value:
    constant = n.arguments.get("mode", "constant") == "constant"
    return t["self"].call(aten.pad.default, n.pad, n.mode, 0.0 if constant else n.value)


def _sum(terms: list[Value]) -> Value:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _added_product(mul: Any, a: str, b: str) -> Any:
    """beta · self + alpha · a b."""

    def rule(n: Call, t: Tangents) -> Value:
        factors = {a: getattr(n, a), b: getattr(n, b)}
        terms = [t["self"] * n.beta] if "self" in t else []
        for name in (name for name in (a, b) if name in t):
            pair = {**factors, name: t[name]}
            terms.append(pair[a].call(mul, pair[b]) * n.alpha)
        return _sum(terms)

    return rule


def _looked_up(n: Call, t: Tangents) -> Value:
    if n.padding_idx >= 0:
        raise NoRule("of an embedding with a padding index")
    return t["weight"].call(aten.embedding.default, n.indices)


def _places(n: Call) -> Value:
    """The second result, the integers: an item of its own, for the one that there is may stand further down."""
    return n.tape.item(Value(n.tape, n.node), 1)


def _extreme(n: Call, t: Tangents) -> Value:
    """Those that share the extreme share its tangent, as in autograd."""
    dims = reduced(n)
    hit = n.self.equals(kept(n, n.out, dims)).to(n.self.dtype)
    return (t["self"] * (hit / hit.sum(dims, keepdim=True))).sum(dims, keepdim=bool(n.arguments.get("keepdim", False)))


def _picked(n: Call, t: Tangents) -> Value | None:
    """The extreme of one dimension, with its place: `max.dim`, `min.dim`, `median.dim`, `kthvalue`."""
    if n.place == 1:
        return None
    dim = n.dim % len(n.self.shape)
    found = t["self"].call(aten.gather.default, dim, kept(n, _places(n), [dim]))
    return found.reshape(n.out.shape)


def _ranked(n: Call, t: Tangents) -> Value | None:
    """`topk` and `sort`: values with their places."""
    return None if n.place == 1 else t["self"].call(aten.gather.default, n.dim % len(n.self.shape), _places(n))


def _softmax(n: Call, t: Tangents) -> Value:
    # Its Jacobian is symmetric.
    return RULES[aten.softmax.int].rules["self"](n, t["self"])


def _log_softmax(n: Call, t: Tangents) -> Value:
    return t["self"] - (t["self"] * n.out.exp()).sum([n.dim], keepdim=True)


def _log_sum(n: Call, t: Tangents) -> Value:
    share = (n.self - kept(n, n.out)).exp()
    return (t["self"] * share).sum(reduced(n), keepdim=n.keepdim)


def _norm(n: Call, t: Tangents) -> Value:
    slope = RULES[n.node.target].rules["self"](n, 1.0)
    return (t["self"] * slope).sum(reduced(n), keepdim=bool(n.arguments.get("keepdim", False)))


def _class_loss(n: Call, t: Tangents) -> Value | None:
    """The scores' tangent times the gradient of the loss, which is softmax minus the class: no log-softmax."""
    if n.place == 1:  # the sum of the weights
        return None
    if n.node.target is aten.cross_entropy_loss.default and not takes(n):
        raise NoRule("of this cross-entropy")
    each = t["self"] * RULES[n.node.target].rules["self"](n, 1.0)
    return each.sum([1]) if n.reduction == 0 else each.sum()


def _maximum(n: Call, t: Tangents) -> Value | None:
    """A max pooling gives one element of each window."""
    if n.place == 1:
        return None
    if n.node.target is aten.max_pool2d_with_indices.default:
        index = _places(n)
    else:
        given = [n.kernel_size, n.stride, n.padding, n.dilation, n.ceil_mode]
        index = n.tape.item(n.self.call(aten.max_pool2d_with_indices.default, *given), 1)
    lead = list(n.self.shape[:-2])
    picked = t["self"].reshape([*lead, -1]).call(aten.gather.default, len(lead), index.reshape([*lead, -1]))
    return picked.reshape(n.out.shape)


own(aten.pad.default, _padded)
own(aten.addmm.default, _added_product(aten.mm.default, "mat1", "mat2"))
own(aten.baddbmm.default, _added_product(aten.bmm.default, "batch1", "batch2"))
own(aten.embedding.default, _looked_up)
own((aten.amax.default, aten.amin.default, aten.max.default, aten.min.default), _extreme)
own((aten.max.dim, aten.min.dim, aten.median.dim, aten.kthvalue.default), _picked)
own((aten.topk.default, aten.sort.default), _ranked)
own((aten.softmax.int, aten._softmax.default, aten._safe_softmax.default), _softmax)
own((aten.log_softmax.int, aten._log_softmax.default), _log_softmax)
own(aten.logsumexp.default, _log_sum)
own((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), _norm)
own((
    aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss_forward.default,
), _class_loss)  # fmt: skip
own((aten.max_pool2d.default, aten.max_pool2d_with_indices.default), _maximum)
