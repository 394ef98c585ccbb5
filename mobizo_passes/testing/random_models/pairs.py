"""Losses over pairs: chosen and rejected answers are joined to one batch, and their scores taken apart again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Compare = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dpo(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    return -F.logsigmoid(0.5 * (chosen - rejected - reference)).mean()


def _ipo(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    return (chosen - rejected - reference - 1.0).square().mean()


def _orpo(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    odds = chosen - rejected - (torch.log1p(-chosen.exp() / 2) - torch.log1p(-rejected.exp() / 2))
    return -chosen.mean() - 0.1 * F.logsigmoid(odds).mean()


def _kto(chosen: Tensor, rejected: Tensor, reference: Tensor) -> Tensor:
    good, bad = 1 - torch.sigmoid(chosen - reference), 1 - torch.sigmoid(reference - rejected)
    return torch.cat([1.5 * good, bad]).mean()


COMPARE: dict[str, Compare] = {"dpo": _dpo, "ipo": _ipo, "orpo": _orpo, "kto": _kto}
# How a model joins `a` and `b`, and how the loss takes the scores `s` of `n` pairs apart.
WAYS: tuple[tuple[str, str, Callable[[Tensor], tuple[Tensor, ...]]], ...] = (
    ("torch.cat([{a}, {b}])", "s[:n], s[n:]", lambda s: (s[: len(s) // 2], s[len(s) // 2 :])),
    ("torch.cat([{a}, {b}])", "s.chunk(2)", lambda s: s.chunk(2)),
    ("torch.stack([{a}, {b}]).flatten(0, 1)", "s.unflatten(0, (2, n)).unbind()",
     lambda s: s.unflatten(0, (2, -1)).unbind()),
    ("torch.stack([{a}, {b}], 1).flatten(0, 1)", "s[::2], s[1::2]", lambda s: (s[::2], s[1::2])),
)  # fmt: skip


def loss_of(kind: str, way: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of outputs [2n, C] or [2n, T, C] beside n reference scores."""

    def loss(outputs: Tensor, reference: Tensor) -> Tensor:
        scores = outputs.log_softmax(-1)[..., 0]
        chosen, rejected = WAYS[way][2](scores if scores.dim() == 1 else scores.mean(1))
        return COMPARE[kind](chosen, rejected, reference)

    return loss
