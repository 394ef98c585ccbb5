"""Losses that random models are trained on: of outputs [..., C] and labels, a scalar or one for each example."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LossFn = Callable[[Tensor, Tensor], Tensor]


def _tokens(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1))


def _sum(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).square().sum() / 4


def _vector(outputs: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1), reduction="none")
    return flat.reshape(labels.shape[0], -1).mean(1)


def _binary(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, wanted.sigmoid())


def _smooth(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1), label_smoothing=0.2)


def _stacked(outputs: Tensor, wanted: Tensor) -> Tensor:
    listed = [F.mse_loss(outputs, wanted), outputs.abs().mean(), (outputs * wanted).sum()]
    return (torch.stack(listed) * torch.tensor([1.0, 0.5, 0.1])).mean()


#: The plain ones; "masked" is for labels of which some are -100.
PLAIN: dict[str, LossFn] = {
    "mse": F.mse_loss, "sum": _sum, "tokens": _tokens, "masked": _tokens, "vector": _vector,
}  # fmt: skip
LOSSES: dict[str, LossFn] = {
    **PLAIN, "binary": _binary, "huber": F.huber_loss, "smooth": _smooth, "stacked": _stacked,
}  # fmt: skip
#: Those whose labels are numbers, not classes.
REGRESSION = ("mse", "sum", "binary", "huber", "stacked")
