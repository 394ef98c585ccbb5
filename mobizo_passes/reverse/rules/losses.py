"""Losses of classes: the cotangent of the scores is their softmax minus the class, and needs no log-softmax."""

from __future__ import annotations

from typing import Any

import torch

from mobizo_passes.reverse.table import REDUCTION, Call, rows
from mobizo_passes.reverse.values import Value

aten = torch.ops.aten


def _classes(n: Call) -> tuple[Value, Value]:
    """Of each row: its class as [N, C] ones and zeros, and its weight in the sum, 0 where it is ignored."""
    dtype = n.self.dtype
    counted = n.target.call(aten.ne.Scalar, n.ignore_index)
    index = counted.where(n.target, n.tape.full([], 0, torch.int64))
    weights = counted.to(dtype)
    if n.arguments.get("weight") is not None:
        weights = weights * n.weight.call(aten.index_select.default, 0, index)
    return index.one_hot(n.self.shape[1], dtype), weights


def _per_row(n: Call, g: Any, weights: Value) -> Value:
    """What one row's loss adds to the whole, as [N, 1]."""
    if n.reduction == 1:
        g = g / weights.sum()
    return (weights * g).reshape([-1, 1])


def takes(n: Call) -> bool:
    """Whether the rules take this loss: rows of scores, one class each, no smoothing."""
    whole = len(n.self.shape) == 2 and n.target.dtype is torch.int64 and len(n.target.shape) == 1
    return whole and not n.arguments.get("label_smoothing", 0)


def _cross_entropy(n: Call, g: Any) -> Value:
    hot, weights = _classes(n)
    return (n.self.softmax(1) - hot) * _per_row(n, g, weights)


def _nll(n: Call, g: Any) -> Value | None:
    if n.place == 1:  # the sum of the weights
        return None
    hot, weights = _classes(n)
    return hot * _per_row(n, -g, weights)


rows(REDUCTION, aten.cross_entropy_loss.default, self=_cross_entropy)
rows(REDUCTION, (aten.nll_loss.default, aten.nll_loss_nd.default, aten.nll_loss_forward.default), self=_nll)
