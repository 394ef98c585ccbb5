"""Hand-written models: spellings of LoRA, layouts, losses, and what couples the examples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from tests import models as known
from tests.coverage import modules as own
from tests.coverage.row import BOTH, ONE_SIDED, SIGNS, Refusal, Row, filled
from tests.models import BATCH, LENGTH, integers, random

Make = Callable[[], nn.Module]


def rows(*shape: int, target: tuple[int, ...] | None = None) -> Callable[[], tuple[Tensor, Tensor]]:
    """Features [batch, *shape] with class labels [batch], or with a target [batch, *target]."""
    return lambda: (random(BATCH, *shape), integers(4, BATCH) if target is None else random(BATCH, *target, seed=9))


def sequence_first() -> tuple[Tensor, Tensor]:
    return random(LENGTH, BATCH, 6), integers(4, BATCH)


def words() -> tuple[Tensor, Tensor]:
    labels = integers(11, BATCH, LENGTH, seed=3)
    labels[:, :2] = -100
    labels[1, 3] = -100
    return integers(11, BATCH, LENGTH), labels


def token_mean(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), label.flatten())


def token_sum(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), label.flatten(), reduction="sum") / 8


def label_loss(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label)


def per_example(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label, reduction="none")


def weighted(outputs: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(outputs, label, weight=torch.tensor([0.5, 1.0, 2.0, 1.5]), label_smoothing=0.1)


def multi_label(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, (wanted > 0).float(), pos_weight=torch.tensor([1.0, 2, 3, 1]))


def distilled(outputs: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(outputs.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def root(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(outputs, wanted).sqrt()


def likelihood(outputs: Tensor, label: Tensor) -> Tensor:
    """Of each sequence, over its own labels; scores with the classes in dimension 1."""
    each = F.cross_entropy(outputs.transpose(1, 2), label, reduction="none")
    return (each.sum(1) / (label >= 0).sum(1)).mean()


def clipped(outputs: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
    """PPO, with the policy of the step before beside it."""
    policy = torch.distributions.Categorical(logits=outputs)
    ratio = (policy.log_prob(action) + 1.4).exp()
    return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() - 0.01 * policy.entropy().mean()


def squared(outputs: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(outputs, wanted)


def absolute_sum(outputs: Tensor, wanted: Tensor) -> Tensor:
    return (outputs - wanted).abs().sum()


def normalized(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Errors divided by the spread of the predictions over the batch."""
    return ((outputs - wanted).square().mean(1) / outputs.std()).mean()


def ranked(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Every pair of examples should be ordered as their targets are."""
    score, order = outputs[:, 0], wanted[:, 0]
    return F.softplus(-(score[:, None] - score[None, :]) * (order[:, None] - order[None, :]).sign()).mean()


def hard_examples(outputs: Tensor, label: Tensor) -> Tensor:
    """Only the two examples of the batch with the largest loss count."""
    return F.cross_entropy(outputs, label, reduction="none").topk(2).values.mean()


def row(
    name: str, variant: str, make: Make, inputs: Callable[[], Any], loss: Any, options: dict[str, Any] | None = None,
    **more: Any,
) -> Row:  # fmt: skip
    return Row(name, variant, lambda: filled(make(), 0.4), inputs, {"loss": loss, **(options or {})}, **more)


def spelled(variant: str, spell: Any, options: dict[str, Any] | None = None, stored: str = "ri,or", **more: Any) -> Row:
    """A row about one spelling; `stored` says how the two factors lie: ri or ir, or or ro."""
    sizes = {"r": 3, "i": 6, "o": 9}
    down, up = (tuple(sizes[c] for c in part) for part in stored.split(","))
    return row("one LoRA layer", variant, lambda: own.Spelled(spell, down, up), rows(LENGTH, 6, target=(LENGTH, 4)),
               squared, options, **more)  # fmt: skip


def trained(make: Make) -> Make:
    return lambda: filled(make(), 0.4).train()


CLASSIFY = (rows(6), label_loss)

SPELLINGS: tuple[Row, ...] = (
    spelled("einsum, two steps", own.einsum, BOTH),
    spelled("einsum, three operands", own.einsum_three),
    spelled("x @ A @ B, stored [in, r], [r, out]", own.products, BOTH, "ir,ro"),
    spelled("x @ A.T @ B.mT", own.transposes, SIGNS),
    spelled("Conv1D: addmm with biases", own.conv1d_style, stored="ir,ro"),
    spelled("scale in a buffer", own.buffer_scale, ONE_SIDED),
    spelled("scale in a parameter", own.learned_scale),
    spelled("scale before, literal", own.scale_before, BOTH),
    spelled("bias on A and on B", own.biases),
    spelled("weight B @ A built first", own.folded_weight),
    spelled("A by broadcasting and sum", own.rowwise),
    row("torchtune names", "lora_a, lora_b", own.Torchtune, *CLASSIFY, BOTH),
    row("diffusers names", "lora.down, lora.up; cross-attention", own.Diffusers,
        lambda: (random(BATCH, 4, 6), random(BATCH, 3, 7), random(BATCH, 4, 5)), squared),
    row("MLP", "own names", known.Mlp, *CLASSIFY, SIGNS),
    row("MLP", "loralib storage", known.Transposed, *CLASSIFY, ONE_SIDED),
    row("attention", "loralib's fused query, key, value", own.FusedQkv, rows(LENGTH, 6, target=(LENGTH, 4)), squared),
)  # fmt: skip

LAYOUTS: tuple[Row, ...] = (
    row("shared module", "called twice", known.CalledTwice, rows(6, target=(4,)), squared, BOTH),
    row("two branches", "LoRA in one", known.OneBranch, rows(6, target=(4,)), squared, ONE_SIDED),
    row("folded batch", "[B*T, D] rows", known.Folded, rows(LENGTH, 6), label_loss, SIGNS),
    row("sequence first", "batch in dimension 1", known.SequenceFirst, sequence_first, label_loss, {"batch_dim": 1}),
    row("sequence first", "inside only", own.TimeMajorInside, rows(LENGTH, 6), label_loss, BOTH),
    row("attention by hand", "4-D, causal", known.Attention, rows(LENGTH, 8, target=(LENGTH, 8)), squared, BOTH),
    row("attention by hand", "bmm over batch × heads", own.HeadsFolded, rows(LENGTH, 8), label_loss),
    row("nn.TransformerEncoderLayer", "batch first", lambda: own.Encoder(True), rows(LENGTH, 6), label_loss),
    row("nn.TransformerEncoderLayer", "sequence first", lambda: own.Encoder(False), sequence_first, label_loss,
        {"batch_dim": 1, **SIGNS}),
    row("nn.MultiheadAttention", "batch first, LoRA on queries", lambda: own.CrossAttention(True), rows(LENGTH, 6),
        label_loss, BOTH),
    row("nn.MultiheadAttention", "sequence first, LoRA on queries", lambda: own.CrossAttention(False), sequence_first,
        label_loss, {"batch_dim": 1}),
    row("recurrent cell", "unrolled over time", own.Recurrent, rows(LENGTH, 6), label_loss, ONE_SIDED),
    row("convolutions", "after LoRA", own.Convolved, rows(LENGTH, 6), label_loss),
    row("convolutions", "before LoRA; BatchNorm in eval mode", known.ConvHead, rows(2, 6, 6), label_loss, BOTH),
    row("two inputs", "one batch first, one sequence first", own.TwoOrders,
        lambda: (random(BATCH, LENGTH, 6), random(LENGTH, BATCH, 6, seed=4), integers(4, BATCH)), label_loss, BOTH),
    row("two inputs", "sequence as long as the batch", own.TwoOrders,
        lambda: (random(BATCH, BATCH, 6), random(BATCH, BATCH, 6, seed=4), integers(4, BATCH)), label_loss),
    row("transposed convolutions", "LoRA on one that upsamples", own.Upsampled, rows(4, 3, 3), label_loss, BOTH),
    row("decoder by hand", "tied embedding, last real token", known.LastRow,
        lambda: (integers(11, BATCH, LENGTH), known._padding(), integers(11, BATCH)), label_loss, ONE_SIDED),
)  # fmt: skip

LOSSES: tuple[Row, ...] = (
    row("loss", "mean with ignore_index", known.Block, words, token_mean, BOTH),
    row("loss", "sum with ignore_index", known.Block, words, token_sum),
    row("loss", "sum of absolute errors", known.Mlp, rows(6, target=(4,)), absolute_sum, SIGNS),
    row("loss", "vector, one value per example", known.Mlp, rows(6), per_example, ONE_SIDED),
    row("loss", "MSE", known.Regression, lambda: (random(BATCH, 6), random(BATCH)), squared),
    row("loss", "class weights, label smoothing", known.Mlp, rows(6), weighted),
    row("loss", "multi-label, positive weights", known.Mlp, rows(6, target=(4,)), multi_label, BOTH),
    row("loss", "KL distillation", known.Mlp, rows(6, target=(4,)), distilled, SIGNS),
    row("loss", "root of the mean square", known.Mlp, rows(6, target=(4,)), root),
    row("loss", "likelihood of each sequence", known.Block, words, likelihood),
    row("loss", "PPO, torch.distributions", known.Mlp,
        lambda: (random(BATCH, 6), integers(4, BATCH), random(BATCH, seed=3)), clipped, BOTH),
    Row("loss", "weight decay on the adapter", lambda: filled(own.Regularized(), 0.4), rows(6)),
)  # fmt: skip

COUPLED: tuple[Row, ...] = (
    Row("coupled", "contrastive loss over the batch", lambda: filled(own.Towers(), 0.4),
        lambda: (random(BATCH, 6), random(BATCH, 5)),
        refused=Refusal(mz.BatchCoupled, "multiplies examples of the batch with one another.*aten.matmul")),
    Row("coupled", "BatchNorm in training mode", trained(own.Normed), rows(6), {"loss": label_loss},
        refused=Refusal(mz.CaptureError, r"changes its own state 'norm.*BatchNorm in training mode")),
    row("coupled", "BatchNorm without statistics", lambda: own.Normed(False), *CLASSIFY,
        refused=Refusal(mz.BatchCoupled, "BatchNorm without running statistics.*in module 'norm'")),
    row("coupled", "mean over the batch", own.Centred, *CLASSIFY,
        refused=Refusal(mz.BatchCoupled, "reduces or normalizes over the batch dimension.*aten.mean")),
    row("coupled", "neighbours in the batch", own.Neighbours, *CLASSIFY,
        refused=Refusal(mz.BatchCoupled, "shifts the batch dimension.*aten.roll")),
    row("coupled", "loss normalized over the batch", known.Mlp, rows(6, target=(4,)), normalized,
        refused=Refusal(mz.BatchCoupled, "puts all examples of the batch together: %std")),
    row("coupled", "pairwise ranking loss", known.Mlp, rows(6, target=(4,)), ranked,
        refused=Refusal(mz.BatchCoupled, "operands hold the batch in different dimensions")),
    row("coupled", "loss of the hardest examples", known.Mlp, rows(6), hard_examples,
        refused=Refusal(mz.BatchCoupled, "ranks examples of the batch against one another.*aten.topk")),
    row("coupled", "capacity-limited routing", own.Capacity, rows(LENGTH, 6), label_loss,
        refused=Refusal(mz.BatchCoupled, "ranks examples of the batch against one another.*aten.topk")),
    Row("coupled", "dropout in training mode", trained(own.Dropped), rows(6), {"loss": label_loss},
        refused=Refusal(mz.CaptureError, "draws random numbers.*dropout")),
    row("not exportable", "control flow on a perturbed value", own.Branching, *CLASSIFY,
        refused=Refusal(mz.CaptureError, "torch.export could not capture Branching: .*data-dependent")),
)  # fmt: skip

ROWS = (*SPELLINGS, *LAYOUTS, *LOSSES, *COUPLED)
