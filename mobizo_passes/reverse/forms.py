"""Attention and norms in elementary operators, whose intermediate results their gradients use again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mobizo_passes.graph.facts import role
from mobizo_passes.graph.heads import before_repeat
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import with_arguments
from mobizo_passes.reverse.table import Call
from mobizo_passes.reverse.values import Tape, Value

aten = torch.ops.aten

# Added to the scores of what a mask hides. Its exponential is 0, and a half can hold it.
HIDDEN = -30_000.0


def attention(n: Call, ir: Ir) -> Value | None:
    """softmax(q kᵀ · scale + mask) v, [N, H, T, e]; heads that share keys and values are further rows of a product.

    A row that may attend to nothing is zero, as in ATen. None for other than four dimensions, or with dropout.
    """
    if n.dropout_p or len(n.query.shape) != 4:
        return None
    query, key, value = n.query, n.key, n.value
    short = before_repeat(key.node), before_repeat(value.node)
    given = [Value(n.tape, each) for each in short if each is not None]
    if len(given) == 2 and given[0].shape[1] == given[1].shape[1]:
        key, value = given
    batch, heads, length, width = query.shape
    groups, positions = key.shape[1:3]
    if (key.shape[0], value.shape[0], value.shape[1]) != (batch, batch, groups) or heads % groups:
        return None
    rows = [batch, groups, heads // groups * length]
    scale = 1 / math.sqrt(width) if n.scale is None else float(n.scale)
    # The scale goes to the fewer numbers.
    if groups * positions < heads * length:
        key = key * scale
    else:
        query = query * scale
    scores = (query.reshape([*rows, width]) @ key.transpose()).reshape([batch, heads, length, positions])
    bias, valid = _mask(n, ir, length, positions)
    scores = scores if bias is None else scores + bias
    mixed = (scores.softmax(3).reshape([*rows, positions]) @ value).reshape([batch, heads, length, value.shape[3]])
    return mixed if valid is None else mixed * valid


def _mask(n: Call, ir: Ir, length: int, positions: int) -> tuple[Value | None, Value | None]:
    """What is added to the scores, and 0 for each row that may attend to nothing, 1 for the others."""
    dtype = n.query.dtype
    if n.is_causal:
        future = torch.ones(length, positions, dtype=torch.bool).triu(1)
        table = torch.zeros(length, positions, dtype=dtype).masked_fill(future, HIDDEN)
        return Value(n.tape, ir.add_constant("causal_bias", table)), None
    mask = n.attn_mask
    if mask is None:
        return None, None
    if mask.dtype == torch.bool:
        allowed, bias = mask, (mask.to(dtype) - 1.0) * -HIDDEN
    else:
        allowed = mask.above(-math.inf)
        bias = mask.call(aten.clamp.default, HIDDEN)
    held = _constant(mask.node, ir)
    if held is not None:
        open_ = held if held.dtype is torch.bool else held > -math.inf
        if bool(open_.any(-1).all()):
            return bias, None
    return bias, allowed.call(aten.any.dim, -1, True).to(dtype)


def _constant(node: fx.Node, ir: Ir) -> Any:
    return ir.state.get(role(node).name) if node.op == "placeholder" else None


def layer_norm(n: Call, ir: Ir) -> Value:
    """(x − mean) · rsqrt(mean((x − mean)²) + ε) · weight + bias over the last dimensions."""
    dims = list(range(-len(n.normalized_shape), 0))
    centered = n.input - _mean(n.input, dims)
    return _affine(_scaled(centered, dims, n.eps), n.weight, n.bias)


def rms_norm(n: Call, ir: Ir) -> Value:
    """x · rsqrt(mean(x²) + ε) · weight over the last dimensions."""
    eps = torch.finfo(n.input.dtype).eps if n.eps is None else n.eps
    return _affine(_scaled(n.input, list(range(-len(n.normalized_shape), 0)), eps), n.weight, None)


def group_norm(n: Call, ir: Ir) -> Value:
    """A layer norm over each group of channels, without weights; then a weight and a bias for each channel."""
    shape = n.input.shape
    x = n.input.reshape([shape[0], n.num_groups, -1])
    y = _scaled(x - _mean(x, [-1]), [-1], n.eps).reshape(shape)
    per_channel = [-1, *[1] * (len(shape) - 2)]
    weight, bias = (None if each is None else each.reshape(per_channel) for each in (n.weight, n.bias))
    return _affine(y, weight, bias)


def variance(n: Call, ir: Ir) -> Value | None:
    """The sum of (x − mean)² over the number of elements, less the correction; `std` is its root."""
    if n.correction is not None and not isinstance(n.correction, int | float):
        return None
    rank = len(n.self.shape)
    dims = [dim % rank for dim in (range(rank) if n.dim is None else n.dim)]
    count = math.prod(n.self.shape[dim] for dim in dims) - (1 if n.correction is None else n.correction)
    centered = n.self - _mean(n.self, dims)
    spread = (centered * centered).sum(dims, keepdim=n.keepdim) * (1 / count if count else math.inf)
    return spread.sqrt() if n.node.target is aten.std.correction else spread


def adaptive_mean(n: Call, ir: Ir) -> Value | None:
    """An adaptive average pooling whose windows are equal is a mean over each."""
    shape, size = n.self.shape, list(n.output_size)
    spatial = shape[-len(size) :]
    if any(each % want for each, want in zip(spatial, size, strict=True)):
        return None
    lead = list(shape[: -len(size)])
    apart = [part for each, want in zip(spatial, size, strict=True) for part in (want, each // want)]
    dims = [len(lead) + 2 * i + 1 for i in range(len(size))]
    return n.self.reshape([*lead, *apart]).call(aten.mean.dim, dims)


def unequal_windows(n: Call, ir: Ir) -> Value | None:
    """An average pooling over windows of different sizes: over equal ones, times what the sizes differ by."""
    divisor = n.arguments.get("divisor_override")
    if not n.ceil_mode and (n.count_include_pad or not any(n.padding)) and not divisor:
        return None
    kernel, padding = list(n.kernel_size), list(n.padding)
    stride, size = list(n.stride or kernel), n.node.meta["val"].shape[-len(kernel) :]
    given: list[Any] = [stride, padding, n.ceil_mode, n.count_include_pad]
    pool: Any = F.avg_pool1d if len(kernel) == 1 else functools.partial(F.avg_pool2d, divisor_override=divisor)
    plain: Any = F.avg_pool1d if len(kernel) == 1 else F.avg_pool2d
    ends: list[int] = []
    for each, k, s, p, windows in zip(n.self.shape[-len(kernel) :], kernel, stride, padding, size, strict=True):
        ends = [p, max((windows - 1) * s + k - each - p, 0), *ends]
    ones = torch.ones(1, 1, *n.self.shape[-len(kernel) :], dtype=n.self.dtype)
    table = pool(ones, kernel, *given) / plain(F.pad(ones, ends), kernel, stride)
    pooled = n.self.call(aten.constant_pad_nd.default, ends).call(n.node.target, kernel, stride)
    return pooled * Value(n.tape, ir.add_constant("windows", table))


def padded(n: Call, ir: Ir) -> Value | None:
    """Padding with what is there already selects its rows and columns."""
    if n.arguments.get("mode", "constant") == "constant":
        return None
    found, rank, pad = n.self, len(n.self.shape), list(n.pad)
    for dim, ends in zip(range(rank - 1, 0, -1), zip(pad[::2], pad[1::2], strict=True), strict=False):
        positions = torch.arange(float(found.shape[dim])).reshape(1, 1, -1)
        rows = F.pad(positions, ends, mode=n.mode).flatten().long()
        found = found.call(aten.index_select.default, dim, ir.add_constant("positions", rows))
    return found


def token_loss(n: Call, ir: Ir) -> Value | None:
    """Scores [N, C, ...] of class numbers [N, ...] as rows: [M, C] and [M]."""
    name = "input" if "input" in n.arguments else "self"
    scores, target = getattr(n, name), n.target
    rank = len(scores.shape)
    if rank < 3 or len(target.shape) == rank or not isinstance(n.node.meta["val"], Tensor):
        return None
    rows = scores.call(aten.permute.default, [0, *range(2, rank), 1]).reshape([-1, scores.shape[1]])
    args, kwargs = with_arguments(n.node, {name: rows, "target": target.reshape([-1])})
    found = n.tape.call(n.node.target, *args, **kwargs)
    return found if n.reduction else found.reshape(target.shape)


def diagonal(n: Call, ir: Ir) -> Value:
    """A diagonal selects places of the two dimensions, side by side as one."""
    shape, rank = n.self.shape, len(n.self.shape)
    first, second = n.dim1 % rank, n.dim2 % rank
    others = [dim for dim in range(rank) if dim not in (first, second)]
    rows, columns = shape[first], shape[second]
    places = torch.arange(rows * columns).reshape(rows, columns).diagonal(n.offset).contiguous()
    flat = n.self.call(aten.permute.default, [*others, first, second]).reshape([*(shape[d] for d in others), -1])
    return flat.call(aten.index_select.default, rank - 2, ir.add_constant("places", places))


def distances(n: Call, ir: Ir) -> Value:
    """The norms of differences between rows: [..., P, M] and [..., R, M] -> [..., P, R]."""
    return (n.x1.unsqueeze(-2) - n.x2.unsqueeze(-3)).call(aten.linalg_vector_norm.default, n.p, [-1])


def _mean(x: Value, dims: list[int]) -> Value:
    return x.call(aten.mean.dim, dims, True)


def _scaled(x: Value, dims: list[int], eps: float) -> Value:
    return x * (_mean(x * x, dims) + eps).rsqrt()


def _affine(x: Value, weight: Value | None, bias: Value | None) -> Value:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


FORMS: dict[Any, Callable[[Call, Ir], Value | None]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.group_norm.default: group_norm,
    aten.var.correction: variance,
    aten.std.correction: variance,
    aten.adaptive_avg_pool1d.default: adaptive_mean,
    aten.adaptive_avg_pool2d.default: adaptive_mean,
    aten._adaptive_avg_pool2d.default: adaptive_mean,
    aten.avg_pool1d.default: unequal_windows,
    aten.avg_pool2d.default: unequal_windows,
    aten.pad.default: padded,
    aten.cross_entropy_loss.default: token_loss,
    aten.nll_loss_nd.default: token_loss,
    aten.diagonal.default: diagonal,
    aten._cdist_forward.default: distances,
}


def write_out(ir: Ir, node: fx.Node) -> fx.Node | None:
    """Write a node out at the insertion point; None if there is no form of it, or none for this use of it."""
    form = FORMS.get(node.target)
    if form is None:
        return None
    made = form(Call(Tape(ir, node), node, node), ir)
    return None if made is None else made.node
