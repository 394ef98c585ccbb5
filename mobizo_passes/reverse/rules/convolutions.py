"""Convolutions and pooling: the cotangent of a convolution's input is a transposed convolution, and the other way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from mobizo_passes.reverse.rules.reductions import place
from mobizo_passes.reverse.table import WHOLE, Call, NoRule, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Window:
    """How a convolution moves, for each spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool = False
    groups: int = 1

    def of(self, x: Value, weight: Value, extra: list[int] | None = None) -> Value:
        extra = [0] * len(self.stride) if extra is None else extra
        return x.call(
            aten.convolution.default, weight, None,
            self.stride, self.padding, self.dilation, self.transposed, extra, self.groups,
        )  # fmt: skip

    def back(self, g: Value, weight: Value, size: tuple[int, ...]) -> Value:
        """The cotangent of an input of this spatial size."""
        turned = replace(self, transposed=not self.transposed)
        if self.transposed:
            return turned.of(g, weight)
        made = [
            (out - 1) * s - 2 * p + d * (k - 1) + 1
            for out, s, p, d, k in zip(
                g.shape[2:], self.stride, self.padding, self.dilation, weight.shape[2:], strict=True
            )
        ]
        return turned.of(g, weight, [want - got for want, got in zip(size, made, strict=True)])


def _window(n: Call) -> Window:
    spatial = len(n.weight.shape) - 2
    given = n.arguments

    def each(name: str, default: int) -> list[int]:
        value = given.get(name, default)
        value = [value] if isinstance(value, int) else list(value)
        return value * spatial if len(value) == 1 else value

    dilation = each("dilation", 1)
    if isinstance(given.get("padding"), str):
        total = [d * (k - 1) for d, k in zip(dilation, n.weight.shape[2:], strict=True)]
        if given["padding"] == "same" and any(each % 2 for each in total):
            raise NoRule("of a convolution that pads one side more than the other")
        padding = [each // 2 for each in total] if given["padding"] == "same" else [0] * spatial
    else:
        padding = each("padding", 0)
    transposed = "output_padding" in given and given.get("transposed", True)
    return Window(each("stride", 1), padding, dilation, bool(transposed), given.get("groups", 1))


def _input(n: Call, g: Value) -> Value:
    return _window(n).back(g, n.weight, n.input.shape[2:])


def _weight(n: Call, g: Value) -> Value:
    window = _window(n)
    x = n.input
    if len(x.shape) != len(n.weight.shape):
        raise NoRule("of a convolution without a batch dimension")
    kernel = n.weight.shape[2:]
    pointwise = all(k == 1 for k in kernel) and window.stride == [1] * len(kernel) and not any(window.padding)
    if pointwise and window.groups == 1:
        by_channel = [_channels(each) for each in ((x, g) if window.transposed else (g, x))]
        return (by_channel[0] @ by_channel[1].transpose()).reshape(n.weight.shape)
    wide, narrow = (g, x) if window.transposed else (x, g)
    # Examples are the channels now, the roles of stride and dilation change places.
    turned = Window(window.dilation, window.padding, window.stride)
    parts = []
    for group in range(window.groups):
        image, filters = (_group(each, group, window.groups).transpose(0, 1) for each in (wide, narrow))
        part = turned.of(image, filters)
        for dim, size in enumerate(kernel, start=2):
            part = part.narrow(dim, 0, size)
        parts.append(part.transpose(0, 1))
    return parts[0] if len(parts) == 1 else n.tape.call(aten.cat.default, parts, 0)


def _channels(x: Value) -> Value:
    """[N, C, ...] as [C, N · ...]."""
    return x.transpose(0, 1).reshape([x.shape[1], -1])


def _group(x: Value, group: int, groups: int) -> Value:
    size = x.shape[1] // groups
    return x.narrow(1, group * size, size)


def _conv_bias(n: Call, g: Value) -> Value:
    return g.sum([dim for dim in range(len(g.shape)) if dim != 1])


def _batch_norm(n: Call, g: Value) -> Value:
    if n.arguments.get("training", False):
        raise NoRule("of a batch norm in training mode")
    scale = (n.running_var + n.eps).rsqrt()
    weight = n.arguments.get("weight")
    scale = scale if weight is None else scale * n.weight
    return g * scale.reshape([-1, *[1] * (len(n.input.shape) - 2)])


def _average(n: Call, g: Value) -> Value:
    """An average pooling is a convolution of each channel with equal weights."""
    padded = any(n.padding)
    if n.ceil_mode or (padded and not n.count_include_pad) or n.arguments.get("divisor_override"):
        raise NoRule("of an average pooling over windows of different sizes")
    kernel = list(n.kernel_size)
    channels = n.self.shape[1]
    weight = n.tape.full([channels, 1, *kernel], 1.0 / math.prod(kernel), g.dtype)
    window = Window(list(n.stride or kernel), list(n.padding), [1] * len(kernel), groups=channels)
    return window.back(g, weight, n.self.shape[2:])


def _maximum(n: Call, g: Value) -> Value | None:
    if n.place == 1:
        return None
    if n.node.target is aten.max_pool2d_with_indices.default:
        index = n.result(1)
    else:
        given = [n.kernel_size, n.stride, n.padding, n.dilation, n.ceil_mode]
        both = n.self.call(aten.max_pool2d_with_indices.default, *given)
        index = n.tape.item(both, 1)
    lead = list(g.shape[:-2])
    at = index.reshape([*lead, -1])
    shape = (*lead, math.prod(n.self.shape[-2:]))
    return place(at, g.reshape([*lead, -1]), len(lead), shape).reshape(n.self.shape)


_CONVOLUTIONS = (
    aten.convolution.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
)  # fmt: skip
rows(WHOLE, _CONVOLUTIONS, input=_input, weight=_weight, bias=_conv_bias)
rows(WHOLE, (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default), input=_batch_norm)
rows(WHOLE, (aten.avg_pool1d.default, aten.avg_pool2d.default), self=_average)
rows(WHOLE, (aten.max_pool2d.default, aten.max_pool2d_with_indices.default), self=_maximum)
