"""Losses that pair examples on purpose, and losses that are lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests.coverage.peft_rows import VOCABULARY, attach, tiny_llama
from tests.coverage.row import BOTH, ONE_SIDED, SIGNS, Refusal, Row, filled
from tests.models import BATCH, LENGTH, Lora, integers, random

Split = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Compare = Callable[..., Tensor]


def halves(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    return x[:n], x[n:]


def chunked(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    chosen, rejected = x.chunk(2)
    return chosen, rejected


def folded(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    chosen, rejected = x.reshape(2, n, *x.shape[1:]).unbind(0)
    return chosen, rejected


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return -F.logsigmoid(0.5 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return ((chosen - rejected) - (ref_chosen - ref_rejected) - 1.0).square().mean()


def simpo(chosen: Tensor, rejected: Tensor, *_: Tensor) -> Tensor:
    return -F.logsigmoid(2.0 * (chosen - rejected) / LENGTH - 0.5).mean()


def orpo(chosen: Tensor, rejected: Tensor, *_: Tensor) -> Tensor:
    """Odds ratio beside the likelihood of the chosen answers."""
    a, b = chosen / LENGTH, rejected / LENGTH
    odds = (a - b) - (torch.log1p(-a.exp()) - torch.log1p(-b.exp()))
    return -a.mean() - 0.1 * F.logsigmoid(odds).mean()


def kto(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Kahneman-Tversky losses of desirable and undesirable answers, joined; the reference point is a constant."""
    good = 1 - torch.sigmoid(0.3 * (chosen - ref_chosen - 0.1))
    bad = 1 - torch.sigmoid(0.3 * (0.1 - (rejected - ref_rejected)))
    return torch.cat([1.5 * good, bad]).mean()


def kto_of_the_batch(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """As TRL has it: the reference point is the mean over the batch."""
    point = (rejected - ref_rejected).mean().clamp(min=0)
    return (1 - torch.sigmoid(0.3 * (chosen - ref_chosen - point))).mean()


class Preferences(nn.Module):
    """Chosen and rejected answers in one forward of the policy; the reference's log-likelihoods are inputs."""

    def __init__(self, compare: Compare, split: Split) -> None:
        super().__init__()
        self.policy: Any = attach(tiny_llama(num_hidden_layers=1))
        self.compare, self.split = compare, split

    def forward(self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        answers = torch.cat([chosen, rejected])
        scores = self.policy(input_ids=answers).logits[:, :-1].log_softmax(-1)
        likelihoods = scores.gather(2, answers[:, 1:, None]).squeeze(2).sum(1)
        return self.compare(*self.split(likelihoods, len(chosen)), ref_chosen, ref_rejected)


class Reward(nn.Module):
    """A reward model of pairs that come as one input: chosen answers first, or the two of a pair side by side."""

    def __init__(self, side_by_side: bool = False) -> None:
        super().__init__()
        self.score, self.side_by_side = Lora(6, 4), side_by_side

    def forward(self, pairs: Tensor) -> Tensor:
        scores = self.score(pairs).sum(1)
        chosen, rejected = (scores[::2], scores[1::2]) if self.side_by_side else scores.chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


def answers() -> dict[str, Tensor]:
    words = {"chosen": integers(VOCABULARY, BATCH, LENGTH), "rejected": integers(VOCABULARY, BATCH, LENGTH, seed=5)}
    return {**words, "ref_chosen": random(BATCH) - 9, "ref_rejected": random(BATCH, seed=4) - 9}


def _pairs(
    variant: str, compare: Compare, split: Split = halves, options: dict[str, Any] | None = None, **more: Any
) -> Row:
    make = lambda: filled(Preferences(compare, split))  # noqa: E731
    return Row("preferences", variant, make, answers, options or {}, **more)


class Heads(nn.Module):
    """A body with LoRA and three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = Lora(6, 8), nn.ModuleList([nn.Linear(8, n) for n in (4, 1, 5)])

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.tanh(self.body(x))
        return [head(h) for head in self.heads]


def _listed(outputs: list[Tensor], label: Tensor) -> list[Tensor]:
    a, b, c = outputs
    return [F.cross_entropy(a, label), b.square().mean(), F.cross_entropy(c, label, reduction="sum")]


def stacked(outputs: list[Tensor], label: Tensor) -> Tensor:
    return torch.stack(_listed(outputs, label)).sum()


def averaged(outputs: list[Tensor], label: Tensor) -> Tensor:
    return torch.stack(_listed(outputs, label)).mean()


def weighted(outputs: list[Tensor], label: Tensor) -> Tensor:
    return (torch.stack(_listed(outputs, label)) * torch.tensor([0.5, 2.0, 0.1])).sum()


def dotted(outputs: list[Tensor], label: Tensor) -> Tensor:
    return torch.stack(_listed(outputs, label)) @ torch.tensor([0.5, 2.0, 0.1])


def uncertain(outputs: list[Tensor], label: Tensor) -> Tensor:
    """Each loss by its own uncertainty (Kendall et al.), here fixed."""
    logs = torch.tensor([0.1, -0.3, 0.7])
    return (torch.stack(_listed(outputs, label)) * torch.exp(-logs) + logs).sum()


def per_example(outputs: list[Tensor], label: Tensor) -> Tensor:
    a, b, c = outputs
    rows = [F.cross_entropy(a, label, reduction="none"), b.square().mean(1), c.exp().mean(1)]
    return torch.stack(rows).mean(0)


def temporal(outputs: list[Tensor], label: Tensor) -> Tensor:
    """CTC over the three heads as if they were frames of one class each."""
    frames = torch.stack([each[:, :1].expand(-1, 6) for each in outputs]).log_softmax(-1)
    n = len(label)
    return F.ctc_loss(frames, label[:, None] + 1, torch.full((n,), 3), torch.full((n,), 1))


def _list(variant: str, loss: Any, options: dict[str, Any] | None = None, **more: Any) -> Row:
    inputs = lambda: (random(BATCH, 6), integers(4, BATCH))  # noqa: E731
    return Row(
        "several losses", variant, lambda: filled(Heads(), 0.4), inputs, {"loss": loss, **(options or {})}, **more
    )


PAIRS: tuple[Row, ...] = (
    _pairs("DPO, halves", dpo),
    _pairs("DPO, chunk", dpo, chunked, BOTH),
    _pairs("DPO, folded into a dimension", dpo, folded, SIGNS),
    _pairs("IPO", ipo, halves, ONE_SIDED),
    _pairs("SimPO", simpo, chunked),
    _pairs("ORPO", orpo),
    _pairs("KTO, fixed reference point", kto),
    _pairs("KTO, reference point of the batch", kto_of_the_batch,
           refused=Refusal(mz.BatchCoupled, "reduced over the whole batch feeds")),
    Row("reward model", "pairs in one input, side by side", lambda: filled(Reward(True), 0.4),
        lambda: (random(2 * BATCH, 6),)),
    Row("reward model", "pairs in one input", lambda: filled(Reward(), 0.4), lambda: (random(2 * BATCH, 6),),
        refused=Refusal(mz.BatchCoupled, "of pairs, let each half be an input of its own")),
)  # fmt: skip

LISTS: tuple[Row, ...] = (
    _list("stacked and added up", stacked),
    _list("stacked and averaged", averaged, SIGNS),
    _list("stacked, times weights", weighted, ONE_SIDED),
    _list("stacked, product with weights", dotted),
    _list("weighted by uncertainty", uncertain),
    _list("stacked for each example", per_example),
    _list("CTC", temporal, refused=Refusal(mz.CaptureError, "CTC loss is not supported")),
)  # fmt: skip
