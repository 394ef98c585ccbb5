"""Mean loss and accuracy over batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from runtime_driver.errors import BatchError, LabelError
from runtime_driver.results import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

    from mobizo_manifest import Manifest
    from runtime_driver.batches import Batch, BatchBinder


class Runner(Protocol):
    """What an evaluation needs of a session."""

    manifest: Manifest
    binder: BatchBinder

    def batch_loss(self, batch: Batch) -> float:
        """The program's loss for a batch, which may have fewer rows than the compiled size."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """The program's logits, one row for each of the batch's."""
        ...


def evaluate(runner: Runner, batches: Iterable[Batch], *, loss: bool, label_ids: Sequence[int] | None) -> Evaluation:
    """See :meth:`runtime_driver.Session.evaluate`."""
    total, weight, correct, examples, count = 0.0, 0, 0, 0, 0
    for batch in batches:
        rows = _rows(batch)
        if loss:
            # The program's loss is a mean over what is labelled; weighting by that makes the whole a mean too.
            labelled = runner.binder.labelled(batch)
            total += runner.batch_loss(batch) * labelled
            weight += labelled
        if label_ids is not None:
            predicted = classify(runner.predict(batch), label_ids)
            correct += int((predicted == _classes(runner.manifest, batch, len(label_ids))).sum())
        examples += rows
        count += 1
    if count == 0:
        raise BatchError("(all)", "there are no batches to evaluate", "Pass at least one batch.")
    return Evaluation(
        loss=total / weight if loss else None,
        accuracy=correct / examples if label_ids is not None else None,
        correct=correct if label_ids is not None else None,
        examples=examples,
        batches=count,
    )


def classify(logits: Tensor, label_ids: Sequence[int]) -> Tensor:
    """The most likely label of each row: int64[B].

    ``logits`` is [B, V], or [B, T, V] of which the last position is read; label ``i`` has the score of column
    ``label_ids[i]``.
    """
    import torch

    last = logits if logits.dim() == 2 else logits[:, -1]
    return last[:, torch.tensor(list(label_ids))].argmax(-1)


def _rows(batch: Batch) -> int:
    if not batch:
        raise BatchError("(all)", "an empty dict", "Give the program's inputs by name.")
    return int(next(iter(batch.values())).shape[0])


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
