"""Values of a graph with the arithmetic of tensors: rules and optimizers are written with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mobizo_passes.graph.ir import Ir

aten = torch.ops.aten


@dataclass
class Tape:
    """Where new nodes go: at the insertion point of `ir`, with the origin of `like`."""

    ir: Ir
    like: fx.Node | None = None
    _constants: dict[Any, Value] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """Append a call; values among the arguments, also in lists, stand for their nodes."""
        plain, named = _nodes(args), {name: _nodes(arg) for name, arg in kwargs.items()}
        return Value(self, self.ir.call(target, *plain, like=self.like, **named))

    def item(self, several: Value, place: int) -> Value:
        """Return one result of an operator with several."""
        return self.call(operator.getitem, several, place)

    def arange(self, size: int) -> Value:
        """Return 0 … size−1, int64 [size], as a constant."""
        return self._constant(("arange", size), lambda: torch.arange(size))

    def full(self, shape: Sequence[int], fill: float, dtype: torch.dtype) -> Value:
        """Return a constant that has one value everywhere."""
        key = ("full", tuple(shape), fill, dtype)
        return self._constant(key, lambda: torch.full(tuple(shape), fill, dtype=dtype))

    def _constant(self, key: Any, make: Any) -> Value:
        if key not in self._constants:
            self._constants[key] = Value(self, self.ir.add_constant(key[0], make()))
        return self._constants[key]


@dataclass(frozen=True, eq=False)
class Value:
    """A node to compute with as if it were a tensor; a product with 1 and a sum with 0 are the value itself."""

    tape: Tape
    node: fx.Node

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def tensor(self) -> Tensor:
        """The fake tensor that says dtype and shape."""
        return self.node.meta["val"]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Value:
        """Return an operator's result with this value as its first argument."""
        return self.tape.call(target, self, *args, **kwargs)

    # Arithmetic --------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Value:
        return self if _is(other, 0) else self.call(aten.add.Tensor, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self if _is(other, 0) else self.call(aten.sub.Tensor, other)

    def __rsub__(self, other: Any) -> Value:
        return -self + other

    def __mul__(self, other: Any) -> Value:
        return self if _is(other, 1) else self.call(aten.mul.Tensor, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self if _is(other, 1) else self.call(aten.div.Tensor, other)

    def __rtruediv__(self, other: Any) -> Value:
        return other * self.reciprocal()

    def __neg__(self) -> Value:
        return self.call(aten.neg.default)

    def __matmul__(self, other: Value) -> Value:
        return self.call(aten.matmul.default, other)

    def exp(self) -> Value:
        return self.call(aten.exp.default)

    def expm1(self) -> Value:
        return self.call(aten.expm1.default)

    def log(self) -> Value:
        return self.call(aten.log.default)

    def sqrt(self) -> Value:
        return self.call(aten.sqrt.default)

    def rsqrt(self) -> Value:
        return self.call(aten.rsqrt.default)

    def reciprocal(self) -> Value:
        return self.call(aten.reciprocal.default)

    def sigmoid(self) -> Value:
        return self.call(aten.sigmoid.default)

    def pow(self, exponent: Any) -> Value:
        target = aten.pow.Tensor_Tensor if isinstance(exponent, Value) else aten.pow.Tensor_Scalar
        return self.call(target, exponent)

    def clamp_max(self, most: float) -> Value:
        return self.call(aten.clamp.default, None, most)

    def softmax(self, dim: int) -> Value:
        return self.call(aten.softmax.int, dim)

    def sum(self, dims: Sequence[int] | None = None, keepdim: bool = False) -> Value:
        """Sum over some dimensions, or (None) over all; over none is the value itself."""
        dims = list(range(len(self.shape))) if dims is None else list(dims)
        return self.call(aten.sum.dim_IntList, dims, keepdim) if dims else self

    # Comparisons give masks; `where` chooses by one ----------------------------------------------------------------

    def equals(self, other: Any) -> Value:
        return self.call(aten.eq.Tensor if isinstance(other, Value) else aten.eq.Scalar, other)

    def at_least(self, other: Any) -> Value:
        return self.call(aten.ge.Tensor if isinstance(other, Value) else aten.ge.Scalar, other)

    def at_most(self, other: Any) -> Value:
        return self.call(aten.le.Tensor if isinstance(other, Value) else aten.le.Scalar, other)

    def above(self, other: Any) -> Value:
        return self.call(aten.gt.Tensor if isinstance(other, Value) else aten.gt.Scalar, other)

    def where(self, chosen: Any, otherwise: Any) -> Value:
        """Choose, element by element, by this mask."""
        if not isinstance(chosen, Value) and not isinstance(otherwise, Value):
            return self.to(torch.float32) * (chosen - otherwise) + otherwise
        if not isinstance(otherwise, Value):
            return self.call(aten.where.ScalarOther, chosen, float(otherwise))
        return self.call(aten.where.self if isinstance(chosen, Value) else aten.where.ScalarSelf, chosen, otherwise)

    # Layouts -----------------------------------------------------------------------------------------------------

    def to(self, dtype: torch.dtype) -> Value:
        return self if self.dtype == dtype else self.call(aten._to_copy.default, dtype=dtype)

    def reshape(self, shape: Sequence[int]) -> Value:
        shape = list(shape)
        if -1 in shape:
            at = shape.index(-1)
            shape[at] = math.prod(self.shape) // max(1, math.prod(shape[:at] + shape[at + 1 :]))
        return self if tuple(shape) == self.shape else self.call(aten.reshape.default, shape)

    def unsqueeze(self, dim: int) -> Value:
        dim %= len(self.shape) + 1
        return self.reshape([*self.shape[:dim], 1, *self.shape[dim:]])

    def permute(self, dims: Sequence[int]) -> Value:
        dims = [dim % len(self.shape) for dim in dims]
        return self if dims == sorted(dims) else self.call(aten.permute.default, dims)

    def transpose(self, a: int = -2, b: int = -1) -> Value:
        order = list(range(len(self.shape)))
        order[a], order[b] = order[b], order[a]
        return self.permute(order)

    def rows(self) -> Value:
        """All dimensions before the last as one."""
        return self.reshape([-1, self.shape[-1]])

    def narrow(self, dim: int, start: int, size: int) -> Value:
        if (start, size) == (0, self.shape[dim]):
            return self
        return self.call(aten.slice.Tensor, dim, start, start + size)

    def expand(self, shape: Sequence[int]) -> Value:
        return self if tuple(shape) == self.shape else self.call(aten.expand.default, list(shape))

    def one_hot(self, classes: int, dtype: torch.dtype) -> Value:
        """Return [..., classes], 1 in the column that an integer names."""
        return self.unsqueeze(-1).equals(self.tape.arange(classes)).to(dtype)


def _is(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _nodes(arg: Any) -> Any:
    if isinstance(arg, Value):
        return arg.node
    return [_nodes(each) for each in arg] if isinstance(arg, list | tuple) else arg
