"""Where batches come from, and whether the program can take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from runtime_driver.errors import BatchError, DataExhaustedError, LabelError, MissingMethodError

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.format import InputSpec, Manifest

Batch = Mapping[str, "Tensor"]
#: By input name, or all inputs in the program's order, as a DataLoader over a TensorDataset gives them.
AnyBatch = Batch | Sequence["Tensor"]


@runtime_checkable
class BatchSource(Protocol):
    """Batches as a function of the step number: the same step always gives the same batch.

    An optional attribute ``fingerprint: str`` identifies the data; a journal remembers it and a resumed run must match.
    Another one, ``former_fingerprint``, is what an earlier release wrote for the same data; it is accepted too.
    """

    def batch(self, step: int) -> Batch:
        """The batch of ``step`` (0 first)."""
        ...


Batches = BatchSource | Sequence[AnyBatch] | Iterable[AnyBatch]


class BatchReader:
    """Reads any kind of batches in step order.

    A :class:`BatchSource` is asked for each step. A sequence is cycled, and so is an iterable of a known length, such
    as a DataLoader of torch: it is iterated anew for each epoch. Any other iterable is consumed once. Of both, the
    batches before the first step that is asked for, and those between steps, are skipped. So a resumed run needs the
    same batches in the same order.
    """

    def __init__(self, batches: Batches, steps: int | None = None) -> None:
        self._steps = steps
        self._source = batches if isinstance(batches, BatchSource) else None
        self._sequence = batches if self._source is None and isinstance(batches, Sequence) else None
        self._iterable: Iterable[AnyBatch] = ()
        if self._source is None and self._sequence is None:
            if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
                raise BatchError(
                    "(all)",
                    f"expected batches, found {type(batches).__name__}",
                    "Pass a list of dicts of tensors, an iterable of them, or an object with `batch(step)`.",
                )
            self._iterable = batches
        self._iterator, self._next = _epochs(self._iterable), 0

    def batch(self, step: int) -> AnyBatch:
        """The batch of ``step``. An iterable starts again if an earlier step than the last one is asked for.

        Raises:
            BatchError: a step that an iterator has passed.
            DataExhaustedError: an iterable or an empty sequence has no more.
        """
        if self._source is not None:
            return self._source.batch(step)
        if self._sequence is not None:
            if not self._sequence:
                raise DataExhaustedError(step, self._steps)
            return self._sequence[step % len(self._sequence)]
        if step < self._next:
            if isinstance(self._iterable, Iterator):
                raise BatchError(
                    "(all)",
                    f"batch {step} is asked for again, and {type(self._iterable).__name__} gives each batch once",
                    "Pass a list, a DataLoader or an object with `batch(step)`, or make the iterator anew.",
                )
            self._iterator, self._next = _epochs(self._iterable), 0
        skipped, self._next = step - self._next, step + 1
        for batch in islice(self._iterator, skipped, None):
            return batch
        raise DataExhaustedError(step, self._steps)


def _epochs(batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
    again = True
    while again:
        again = False
        for batch in batches:
            again = isinstance(batches, Sized)
            yield batch


class BatchBinder:
    """Checks batches against the manifest and puts their tensors in a method's order."""

    def __init__(self, manifest: Manifest) -> None:
        self._batch = manifest.batch
        self._specs: dict[str, dict[str, InputSpec]] = {
            method: {item.name: item for item in spec.inputs if item.role == "batch"}
            for method, spec in manifest.methods.items()
        }
        self._by_rows = manifest.evaluation is not None and not manifest.evaluation.refusal
        self._dims = _dims(manifest)
        classes = manifest.batch.class_inputs
        self._classes = manifest.batch.label_inputs if classes is None else classes
        words = manifest.application.get("label_words")
        self._words = len(words) if isinstance(words, list) and words else None
        self._columns = _logits_columns(manifest)

    def named(self, batch: AnyBatch) -> Batch:
        """The batch by input name; raises `BatchError` for a list of another length than the program's inputs."""
        if isinstance(batch, Mapping):
            return batch
        names = list(self._batch.inputs)
        if not isinstance(batch, Sequence) or isinstance(batch, str):
            raise BatchError(
                "(all)",
                f"expected a dict of tensors, found {type(batch).__name__}",
                f"Bind the inputs {names} by name.",
            )
        if len(batch) != len(names):
            raise BatchError(
                "(all)",
                f"has {len(batch)} tensors, the program takes {names}",
                "Give as many in this order, or a dict.",
            )
        return dict(zip(names, batch, strict=True))

    def bind(self, method: str, batch: AnyBatch, *, partial: bool = False) -> tuple[dict[str, Tensor], int]:
        """Tensors by input name, contiguous, of exactly the compiled shapes; and the number of real rows.

        A method without labels ignores the batch's label inputs. With ``partial``, a batch of fewer rows is filled up
        by repeating its last row; a program that does not give out its loss row by row, and has an ignore index, gets
        that row without its labels.

        Raises:
            MissingMethodError: the program has no such method.
            BatchError: missing or unknown names, or another dtype or shape than the program's.
            LabelError: a label out of range, too many labelled positions, or none at all.
        """
        specs = self._specs.get(method)
        if specs is None:
            raise MissingMethodError(method, sorted(self._specs))
        given = self.named(batch)
        self._check_names(specs, given)
        rows = self._rows(specs, given, partial)
        bound: dict[str, Tensor] = {}
        for name in specs:
            tensor = given[name]
            dim = self._dims.get(name)
            if name in self._classes:
                self._check_labels(name, tensor if dim is None else tensor.movedim(dim, 0))
            if rows < self._batch.size and dim is not None:
                tensor = self._fill(name, tensor, rows, dim)
            bound[name] = tensor.detach().contiguous()
        return bound, rows

    def rows(self, batch: Batch) -> int:
        """How many examples a batch has, by its first input that holds the batch."""
        if not batch:
            raise BatchError("(all)", "an empty dict", "Give the program's inputs by name.")
        for name, tensor in batch.items():
            dim = self._dims.get(name)
            if dim is not None and tensor.dim() > dim:
                return int(tensor.shape[dim])
        return self._batch.size

    def labelled(self, batch: Batch) -> int:
        """How many label positions of the batch count in its mean loss; the rows if the program ignores none."""
        index = self._batch.ignore_index
        for name in self._batch.label_inputs:
            labels = batch[name]
            if index is not None and not labels.is_floating_point():
                return int((_counted(labels, self._batch.shift) != index).sum())
        return self.rows(batch)

    def _check_names(self, specs: Mapping[str, InputSpec], batch: Batch) -> None:
        for name in specs:
            if name not in batch:
                raise BatchError(name, f"is missing; the batch has {sorted(batch)}", "Add it to the batch.")
        for name in batch:
            if name not in self._batch.inputs:
                raise BatchError(
                    name, f"is not an input of the program, which takes {list(self._batch.inputs)}", "Remove it."
                )

    def _rows(self, specs: Mapping[str, InputSpec], batch: Batch, partial: bool) -> int:
        import torch

        size = self._batch.size
        rows: int | None = None
        for name, spec in specs.items():
            tensor = batch[name]
            if not isinstance(tensor, torch.Tensor):
                raise BatchError(name, f"expected a torch.Tensor, found {type(tensor).__name__}", "Convert it.")
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype != spec.dtype:
                raise BatchError(name, f"expected dtype {spec.dtype}, found {dtype}", f"Use tensor.to({spec.dtype}).")
            shape = tuple(tensor.shape)
            dim = self._dims.get(name)
            short = partial and dim is not None and len(shape) == len(spec.shape) and 0 < shape[dim] < size
            short = short and all(d == dim or shape[d] == extent for d, extent in enumerate(spec.shape))
            if shape != spec.shape and not short:
                raise BatchError(
                    name,
                    f"expected shape {list(spec.shape)}, found {list(shape)}",
                    "Pad or cut the batch to the compiled shape, or lower the model with an example batch of this one.",
                )
            if dim is not None:
                if rows not in (None, shape[dim]):
                    raise BatchError(name, f"has {shape[dim]} rows, other inputs have {rows}", "Make them equal.")
                rows = shape[dim]
        return size if rows is None else rows

    def _check_labels(self, name: str, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.numel() == 0:
            return
        index = self._batch.ignore_index
        counted = labels if index is None else labels[labels != index]
        if counted.numel():
            low, high = int(counted.min()), int(counted.max())
            # One label per example is a label word where the application names them; else it is a column of logits.
            limit = self._words if self._words is not None and labels.dim() == 1 else self._columns
            if low < 0 or (limit is not None and high >= limit):
                bad = low if low < 0 else high
                wanted = "a label >= 0" if limit is None else f"a label in [0, {limit})"
                ignored = "" if index is None else f" or {index}, which is ignored"
                raise LabelError(name, f"expected {wanted}{ignored}, found {bad}", "Correct the labels.")
        if index is None or labels.dim() == 0:
            return
        per_row = (_counted(labels, self._batch.shift) != index).reshape(labels.shape[0], -1).sum(1)
        if int(per_row.sum()) == 0:
            raise LabelError(
                name, f"no position is labelled (all are {index})", "Leave examples without labels out of the data."
            )
        most = self._batch.max_labels
        if most is not None and int(per_row.max()) > most:
            row = int(per_row.argmax())
            raise LabelError(
                name,
                f"row {row} has {int(per_row[row])} labelled positions, the program reads at most {most} of each row",
                "Set the others to the ignore index, or lower the model with an example batch that has as many.",
            )

    def _fill(self, name: str, tensor: Tensor, rows: int, dim: int) -> Tensor:
        import torch

        last = tensor.narrow(dim, rows - 1, 1).repeat_interleave(self._batch.size - rows, dim)
        if name in self._batch.label_inputs and self._batch.ignore_index is not None and not self._by_rows:
            last = torch.full_like(last, self._batch.ignore_index)
        return torch.cat([tensor, last], dim)


def _dims(manifest: Manifest) -> dict[str, int | None]:
    """Where each input holds the batch; version 1 took dimension 0 of every input that is as long as the batch."""
    if manifest.batch.dims is not None:
        return dict(manifest.batch.dims)
    specs = [item for method in manifest.methods.values() for item in method.inputs if item.role == "batch"]
    return {item.name: 0 if item.shape and item.shape[0] == manifest.batch.size else None for item in specs}


def _counted(labels: Tensor, shift: bool) -> Tensor:
    return labels[:, 1:] if shift and labels.dim() > 1 else labels


def _logits_columns(manifest: Manifest) -> int | None:
    logits = manifest.methods.get("logits")
    shapes = [item.shape for item in logits.outputs if item.role == "logits"] if logits is not None else []
    return shapes[0][-1] if shapes and shapes[0] else None
