"""What operators without a rule consist of, where torch does not say it, or says it by strides or for one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp.decompositions import one_layer_lstm

aten = torch.ops.aten


def col2im(
    x: Tensor, size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:  # fmt: skip
    """`F.fold`, [N, C·k·k, L] -> [N, C, H, W]: each entry is written to its place by a convolution with a one."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    windows = [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(size, padding, reach, stride, strict=True)]
    rest = [
        n + 2 * p - r - (w - 1) * s
        for n, p, r, w, s in zip(size, padding, reach, windows, stride, strict=True)
    ]  # fmt: skip
    count = kernel[0] * kernel[1]
    channels = x.shape[-2] // count
    ones = torch.eye(count, dtype=x.dtype).reshape(count, 1, *kernel).repeat(channels, 1, 1, 1)
    patches = x.reshape(-1, channels * count, *windows)
    folded = F.conv_transpose2d(patches, ones, None, stride, padding, rest, channels, dilation)
    return folded.reshape(*x.shape[:-2], channels, *size)


def unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """`Tensor.unfold`: windows along one dimension, a dimension of their own behind all others."""
    dim %= x.dim()
    windows = (x.shape[dim] - size) // step + 1
    positions = torch.arange(windows)[:, None] * step + torch.arange(size)
    return x.index_select(dim, positions.flatten()).unflatten(dim, (windows, size)).movedim(dim + 1, -1)


def var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Two reductions of the same."""
    dims = list(range(x.dim())) if dim is None else list(dim)
    return x.var(dims, correction=1 if correction is None else correction, keepdim=keepdim), x.mean(dims, keepdim)


def trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand_a: Sequence[int], expand_b: Sequence[int], expand_c: Sequence[int],
    summed: Sequence[int], unroll_dim: int = 1,
) -> Tensor:  # fmt: skip
    """`nn.Bilinear`: a product of three that broadcast, summed."""
    for dims, at in ((expand_a, 0), (expand_b, 1), (expand_c, 2)):
        for dim in sorted(dims):
            a, b, c = (x.unsqueeze(dim) if place == at else x for place, x in enumerate((a, b, c)))
    return (a * b * c).sum(list(summed))


def lstm_layer(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, h: Tensor, c: Tensor, reverse: bool, sizes: Any,
    mode: int, hidden: int, layers: int, has_biases: bool, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer of an LSTM as torch's CPU library computes it, written out over time."""
    out, (last, cell) = one_layer_lstm(x, (h, c), [w0, w1, w2, w3], has_biases, reverse)
    return out, last, cell, x.new_empty(0)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """Features where a mask is true, in order, as models of images and text put them among words."""
    mask = mask.expand_as(x)
    return torch.where(mask, _in_order(mask, source.flatten()).reshape(x.shape), x)


def put_through_mask(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """``x[mask] = values`` with a mask of leading dimensions, and a value for each place or for all."""
    (mask,) = indices
    if accumulate or mask is None or mask.dtype is not torch.bool:
        raise NotImplementedError
    inner = x.dim() - mask.dim()
    where = mask.reshape(*mask.shape, *[1] * inner)
    if values.dim() <= inner:
        return torch.where(where, values, x)
    return torch.where(where, _in_order(mask, values).reshape(*mask.shape, *values.shape[1:]), x)


def _in_order(mask: Tensor, values: Tensor) -> Tensor:
    """For each place of a mask the value whose turn it is there; anything where the mask is false."""
    return values[(mask.flatten().cumsum(0) - 1).clamp(0, values.shape[0] - 1)]


PARTS: Mapping[Any, Callable[..., Any]] = {
    aten.col2im.default: col2im,
    aten.unfold.default: unfold,
    aten.var_mean.correction: var_mean,
    aten.masked_scatter.default: masked_scatter,
    aten.index_put.default: put_through_mask,
    aten._trilinear.default: trilinear,
    aten.mkldnn_rnn_layer.default: lstm_layer,
}
