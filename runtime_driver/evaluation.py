"""Loss and accuracy over batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from runtime_driver.combining import LossTotals
from runtime_driver.errors import BatchError, LabelError
from runtime_driver.results import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import AnyBatch, Batch, BatchBinder
    from runtime_driver.executor import Executor
    from runtime_driver.format import Manifest


def evaluate(
    executor: Executor, batches: Iterable[AnyBatch], *, loss: bool, label_ids: Sequence[int] | None
) -> Evaluation:
    """See :meth:`runtime_driver.Session.evaluate`."""
    losses = Losses(executor.manifest, executor.binder)
    correct, examples, count = 0, 0, 0
    for each in batches:
        batch = executor.binder.named(each)
        if loss:
            losses.add(batch, *executor.loss_outputs(batch))
        if label_ids is not None:
            predicted = classify(executor.predict(batch), label_ids)
            correct += int((predicted == _classes(executor.manifest, batch, len(label_ids))).sum())
        examples += executor.binder.rows(batch)
        count += 1
    if count == 0:
        raise BatchError("(all)", "there are no batches to evaluate", "Pass at least one batch.")
    return Evaluation(
        loss=losses.value if loss else None,
        accuracy=correct / examples if label_ids is not None else None,
        correct=correct if label_ids is not None else None,
        examples=examples,
        batches=count,
    )


class Losses:
    """The loss over batches, in the way that the program's manifest knows."""

    def __init__(self, manifest: Manifest, binder: BatchBinder) -> None:
        self._manifest = manifest
        self._binder = binder
        spec = manifest.evaluation
        self._refusal = "" if spec is None else spec.refusal
        self._totals = LossTotals(spec) if spec is not None and not spec.refusal else None
        self._only: float | None = None
        self._sum, self._weight = 0.0, 0

    def add(self, batch: Batch, outputs: dict[str, Tensor], rows: int) -> None:
        """Add what `loss` returned for a batch of which ``rows`` rows are real.

        Raises:
            BatchError: the program does not say how an incomplete batch, or a second one, would count.
        """
        size = self._manifest.batch.size
        whole = rows == size
        loss = float(outputs["loss"])
        if self._totals is not None:
            self._totals.add(outputs, rows)
            # One whole batch has the loss that the program gives, to the bit.
            self._only = loss if whole and self._totals.batches == 1 else None
        elif self._refusal:
            if not whole or self._only is not None:
                size = self._manifest.batch.size
                found = (
                    "there is more than one batch" if whole else f"the batch has {rows} rows, the program takes {size}"
                )
                raise BatchError(
                    "(all)",
                    f"{found}, and the loss of a batch can't be put together from parts: {self._refusal}",
                    "Evaluate whole batches one by one, or use a loss that is a mean or a sum over examples.",
                )
            self._only = loss
        else:
            if not whole and not _is_token_mean(self._manifest):
                raise BatchError(
                    "(all)",
                    f"the batch has {rows} rows of {size}, and a program of format version 1 does not say how its loss "
                    "weighs examples",
                    "Leave the incomplete batch out, or lower the model again with this version.",
                )
            # A mean over what is labelled, or so version 1 takes it: weighting by that makes the whole a mean too.
            labelled = self._binder.labelled(batch)
            self._sum += loss * labelled
            self._weight += labelled

    @property
    def value(self) -> float:
        """The loss of everything added so far."""
        if self._only is not None:
            return self._only
        return self._totals.value if self._totals is not None else self._sum / self._weight


def _is_token_mean(manifest: Manifest) -> bool:
    """Whether a program of version 1 is known to take the mean over labels: the command line makes no other."""
    return manifest.batch.ignore_index is not None and bool(manifest.application or manifest.batch.max_labels)


def classify(logits: Tensor, label_ids: Sequence[int]) -> Tensor:
    """The most likely label of each row: int64[B].

    ``logits`` is [B, V], or [B, T, V] of which the last position is read; label ``i`` has the score of column
    ``label_ids[i]``.
    """
    import torch

    last = logits if logits.dim() == 2 else logits[:, -1]
    return last[:, torch.tensor(list(label_ids))].argmax(-1)


def _classes(manifest: Manifest, batch: Batch, count: int) -> Tensor:
    for name in manifest.batch.label_inputs:
        if name in batch and batch[name].dim() == 1:
            labels = batch[name]
            if int(labels.max()) >= count or int(labels.min()) < 0:
                raise LabelError(name, f"expected labels in [0, {count})", "Give one label id for each label.")
            return labels
    raise BatchError(
        "label",
        f"accuracy needs a label input of shape [B]; the program has {list(manifest.batch.label_inputs)}",
        "Evaluate the loss alone, or compute the metric from `predict`.",
    )
