"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import math
from typing import Any

import torch

from mobizo_passes.reverse.table import ELEMENTWISE, Call, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def zero(n: Call, g: Any) -> None:
    """The derivative is zero, or the value is cut off from its gradient on purpose."""


def _power(n: Call, g: Any) -> Any:
    e = n.exponent
    if isinstance(e, int | float):
        return g * e * (n.self if e == 2 else n.self.pow(e - 1)) if e != 0 else None
    return g * e * n.self.pow(e - 1)


def _tied(n: Call, g: Any, mine: Value, other: Value) -> Any:
    """Where both are equal each gets half, as in autograd."""
    dtype = n.out.dtype
    return g * (mine.at_least(other).to(dtype) + mine.above(other).to(dtype)) * 0.5


def _gelu(n: Call, g: Any) -> Any:
    x = n.self
    if n.approximate == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        t = inner.call(aten.tanh.default)
        slope = (x * x * (3 * 0.044715) + 1.0) * math.sqrt(2 / math.pi)
        return g * ((t + 1.0) * 0.5 + x * 0.5 * (1.0 - t * t) * slope)
    below = (x * math.sqrt(0.5)).call(aten.erf.default) * 0.5 + 0.5
    return g * (below + x * (x * x * -0.5).exp() * (1 / math.sqrt(2 * math.pi)))


def _silu(n: Call, g: Any) -> Any:
    s = n.self.sigmoid()
    return g * (s + n.out * (1.0 - s))


def _between(n: Call, low: Any, high: Any) -> Value:
    """1 where the value lies between two bounds, either of which may be None."""
    dtype = n.out.dtype
    inside = [] if low is None else [n.self.at_least(low).to(dtype)]
    if high is not None:
        inside.append(n.self.at_most(high).to(dtype))
    return inside[0] * inside[1] if len(inside) == 2 else inside[0]


def _softplus(n: Call, g: Any) -> Any:
    scaled = n.self * n.beta
    slope = scaled.sigmoid()
    return g * (scaled.above(n.threshold)).where(slope.tape.full([], 1.0, slope.dtype), slope)


def _elu(n: Call, g: Any) -> Any:
    x = n.self
    low = (x * n.input_scale).exp() * (n.alpha * n.scale * n.input_scale)
    return g * x.above(0).where(x.tape.full([], float(n.scale), x.dtype), low)


# Sums and products ----------------------------------------------------------------------------------------------------
rows(ELEMENTWISE, (aten.add.Tensor, aten.add.Scalar), self=lambda n, g: g, other=lambda n, g: g * n.alpha)
rows(ELEMENTWISE, (aten.sub.Tensor, aten.sub.Scalar), self=lambda n, g: g, other=lambda n, g: g * -n.alpha)
rows(ELEMENTWISE, (aten.rsub.Scalar, aten.rsub.Tensor), self=lambda n, g: g * -n.alpha, other=lambda n, g: g)
rows(ELEMENTWISE, (aten.mul.Tensor, aten.mul.Scalar), self=lambda n, g: g * n.other, other=lambda n, g: g * n.self)
rows(
    ELEMENTWISE, (aten.div.Tensor, aten.div.Scalar),
    self=lambda n, g: g / n.other, other=lambda n, g: g * (n.out / n.other) * -1.0,
)  # fmt: skip
rows(ELEMENTWISE, aten.neg.default, self=lambda n, g: g * -1.0)
rows(ELEMENTWISE, aten.reciprocal.default, self=lambda n, g: g * (n.out * n.out) * -1.0)
rows(
    ELEMENTWISE, aten.addcmul.default,
    self=lambda n, g: g, tensor1=lambda n, g: g * n.value * n.tensor2, tensor2=lambda n, g: g * n.value * n.tensor1,
)  # fmt: skip
rows(ELEMENTWISE, aten.lerp.Scalar, self=lambda n, g: g * (1 - n.weight), end=lambda n, g: g * n.weight)

# Powers and exponentials ----------------------------------------------------------------------------------------------
rows(ELEMENTWISE, aten.square.default, self=lambda n, g: g * 2.0 * n.self)
rows(ELEMENTWISE, aten.sqrt.default, self=lambda n, g: g * 0.5 / n.out)
rows(ELEMENTWISE, aten.rsqrt.default, self=lambda n, g: g * -0.5 * (n.out * n.out * n.out))
rows(ELEMENTWISE, aten.pow.Tensor_Scalar, self=_power)
rows(ELEMENTWISE, aten.pow.Tensor_Tensor, self=_power, exponent=lambda n, g: g * n.out * n.self.log())
rows(ELEMENTWISE, aten.pow.Scalar, exponent=lambda n, g: g * math.log(n.self) * n.out)
rows(ELEMENTWISE, aten.exp.default, self=lambda n, g: g * n.out)
rows(ELEMENTWISE, aten.expm1.default, self=lambda n, g: g * (n.out + 1.0))
rows(ELEMENTWISE, aten.log.default, self=lambda n, g: g / n.self)
rows(ELEMENTWISE, aten.log1p.default, self=lambda n, g: g / (n.self + 1.0))
rows(ELEMENTWISE, aten.log2.default, self=lambda n, g: g * (1 / math.log(2)) / n.self)
rows(ELEMENTWISE, aten.sin.default, self=lambda n, g: g * n.self.call(aten.cos.default))
rows(ELEMENTWISE, aten.cos.default, self=lambda n, g: g * -1.0 * n.self.call(aten.sin.default))
rows(ELEMENTWISE, aten.atan.default, self=lambda n, g: g / (n.self * n.self + 1.0))
rows(
    ELEMENTWISE, aten.atan2.default,
    self=lambda n, g: g * n.other / (n.self * n.self + n.other * n.other),
    other=lambda n, g: g * -1.0 * n.self / (n.self * n.self + n.other * n.other),
)  # fmt: skip
rows(ELEMENTWISE, aten.hypot.default, self=lambda n, g: g * n.self / n.out, other=lambda n, g: g * n.other / n.out)
rows(ELEMENTWISE, aten.lgamma.default, self=lambda n, g: g * n.self.call(aten.digamma.default))
rows(ELEMENTWISE, aten.asin.default, self=lambda n, g: g * (1.0 - n.self * n.self).rsqrt())
rows(ELEMENTWISE, aten.acos.default, self=lambda n, g: g * -1.0 * (1.0 - n.self * n.self).rsqrt())
rows(ELEMENTWISE, aten.tan.default, self=lambda n, g: g * (n.out * n.out + 1.0))
rows(ELEMENTWISE, aten.sinh.default, self=lambda n, g: g * n.self.call(aten.cosh.default))
rows(ELEMENTWISE, aten.cosh.default, self=lambda n, g: g * n.self.call(aten.sinh.default))
rows(ELEMENTWISE, aten.asinh.default, self=lambda n, g: g * (n.self * n.self + 1.0).rsqrt())
rows(ELEMENTWISE, aten.acosh.default, self=lambda n, g: g * (n.self * n.self - 1.0).rsqrt())
rows(ELEMENTWISE, aten.atanh.default, self=lambda n, g: g / (1.0 - n.self * n.self))
rows(ELEMENTWISE, aten.exp2.default, self=lambda n, g: g * math.log(2) * n.out)
rows(ELEMENTWISE, aten.log10.default, self=lambda n, g: g * (1 / math.log(10)) / n.self)
rows(ELEMENTWISE, aten.erf.default, self=lambda n, g: g * (2 / math.sqrt(math.pi)) * (-n.self * n.self).exp())
rows(ELEMENTWISE, aten.erfc.default, self=lambda n, g: g * (-2 / math.sqrt(math.pi)) * (-n.self * n.self).exp())

# Activations ----------------------------------------------------------------------------------------------------------
rows(ELEMENTWISE, aten.sigmoid.default, self=lambda n, g: g * (n.out - n.out * n.out))
rows(ELEMENTWISE, aten.tanh.default, self=lambda n, g: g * (1.0 - n.out * n.out))
rows(ELEMENTWISE, aten.relu.default, self=lambda n, g: g * n.out.above(0).to(n.out.dtype))
rows(ELEMENTWISE, aten.silu.default, self=_silu)
rows(ELEMENTWISE, aten.gelu.default, self=_gelu)
rows(ELEMENTWISE, aten.softplus.default, self=_softplus)
rows(
    ELEMENTWISE, aten.log_sigmoid_forward.default,
    self=lambda n, g: None if n.place == 1 else g * (n.self * -1.0).sigmoid(),
)  # fmt: skip
rows(ELEMENTWISE, aten.elu.default, self=_elu)
rows(
    ELEMENTWISE, aten.leaky_relu.default,
    self=lambda n, g: g * (n.self.above(0).to(n.out.dtype) * (1 - n.negative_slope) + n.negative_slope),
)  # fmt: skip
rows(ELEMENTWISE, aten.clamp.default, self=lambda n, g: g * _between(n, n.min, n.max))
rows(ELEMENTWISE, aten.clamp_min.default, self=lambda n, g: g * _between(n, n.min, None))
rows(ELEMENTWISE, aten.clamp_max.default, self=lambda n, g: g * _between(n, None, n.max))
rows(ELEMENTWISE, aten.hardtanh.default, self=lambda n, g: g * _between(n, n.min_val, n.max_val))
rows(ELEMENTWISE, aten.abs.default, self=lambda n, g: g * n.self.call(aten.sign.default))

# Choices --------------------------------------------------------------------------------------------------------------
rows(
    ELEMENTWISE, aten.maximum.default,
    self=lambda n, g: _tied(n, g, n.self, n.other), other=lambda n, g: _tied(n, g, n.other, n.self),
)  # fmt: skip
rows(
    ELEMENTWISE, aten.minimum.default,
    self=lambda n, g: _tied(n, g, n.other, n.self), other=lambda n, g: _tied(n, g, n.self, n.other),
)  # fmt: skip
rows(
    ELEMENTWISE, (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf),
    self=lambda n, g: n.condition.where(g, 0.0), other=lambda n, g: _otherwise(n.condition, g),
)  # fmt: skip
rows(
    ELEMENTWISE, (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    self=lambda n, g: _otherwise(n.mask, g),
    value=lambda n, g: n.mask.where(g, 0.0),
)  # fmt: skip


def _otherwise(condition: Value, g: Any) -> Value:
    """g where the condition does not hold."""
    return condition.call(aten.logical_not.default).where(g, 0.0)


# Casts, and what has no slope -----------------------------------------------------------------------------------------
_SAME = (
    aten._to_copy.default, aten.type_as.default, aten.clone.default, aten.alias.default, aten.contiguous.default,
)  # fmt: skip
_FLAT = (
    aten.detach.default, aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default,
    aten.sign.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.empty_like.default, aten.new_empty.default,
)  # fmt: skip
rows(ELEMENTWISE, _SAME, self=lambda n, g: g)
rows(ELEMENTWISE, aten.dropout.default, input=lambda n, g: g)
rows(ELEMENTWISE, _FLAT, self=zero)
