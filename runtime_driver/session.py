"""A session: one .pte, one adapter, and what can be done with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver import adapter_io, adapter_out, finite, resume
from runtime_driver.errors import HyperparameterError, NotReplayableError
from runtime_driver.evaluation import Losses, evaluate
from runtime_driver.executor import Executor, clones
from runtime_driver.journal import FsyncPolicy, read_journal
from runtime_driver.notebook import progress_bars
from runtime_driver.program import LoadedProgram
from runtime_driver.results import Evaluation, FitResult, StepOutput
from runtime_driver.schedule import Schedule, as_schedule, checked
from runtime_driver.training import RunOptions, TrainingRun

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import AnyBatch, Batch, Batches
    from runtime_driver.callbacks import Callback
    from runtime_driver.fleet import Workers
    from runtime_driver.format import Manifest


class Session:
    """Runs a lowered program through ExecuTorch's Python runtime, and holds the adapter that it trains.

    Methods of the program are loaded on first use: training alone keeps only ``step`` in memory, an evaluation adds
    ``loss`` (and ``logits`` for accuracy); :meth:`release` frees them. Not thread-safe.
    """

    def __init__(self, path: str | Path, weights_file: str | Path | None = None, *, verify: bool = True) -> None:
        """Open a .pte; the adapter is the initial one stored in it.

        Args:
            weights_file: the .ptd of a program that was lowered with external weights. None: it is beside the program.
                It is looked for when a method first needs it; ``apply``, and so :meth:`replay`, never does.
            verify: compare the program's SHA-256 with the one in its footer before the runtime sees it, and that of the
                weights file when it is first needed; reads each file once (about a gigabyte a second).

        Warns:
            UnprovenWarning: the program is of format 1 and has no hash.

        Raises:
            WeightsFileError: a weights file is given, and the program has its weights inside.
            ProgramFileError: not a whole, undamaged, loadable .pte of ours.
            runtime_driver.format.ManifestError: the manifest inside is not valid, or of another version.
            SidecarMismatchError: the ``.json`` of the same name belongs to another program.
            AdapterError: the stored initial adapter is not what the manifest says.
        """
        self.program = LoadedProgram(path, weights_file, verify=verify)
        self.manifest: Manifest = self.program.manifest
        self._executor = Executor(self.program)

    # The adapter

    @property
    def adapter(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors by FQN, in the manifest's order. Assign a dict to replace them all.

        Raises:
            AdapterError: on assignment of missing, unknown, unfit or non-finite tensors.
        """
        return clones(self._executor.adapter)

    @adapter.setter
    def adapter(self, value: Mapping[str, Tensor]) -> None:
        self._take(adapter_io.checked_adapter(self.manifest.trainable_adapter, value))

    def _take(self, adapter: dict[str, Tensor]) -> None:
        """Make this the adapter; the optimizer's state belonged to another, so it begins anew."""
        self._executor.adapter = adapter
        self._executor.optimizer = self._executor.fresh_optimizer()

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """Copies of the optimizer's state by name; empty for an optimizer without one."""
        return clones(self._executor.optimizer)

    @property
    def perturbs(self) -> bool:
        """Whether a step perturbs the adapter, and so takes an ``eps``."""
        return self._executor.perturbs

    @property
    def initial_adapter(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors stored in the .pte."""
        return clones(self._executor.initial)

    @property
    def frozen_adapter(self) -> dict[str, Tensor]:
        """Copies of the frozen LoRA tensors (``lora_A`` by default); they are compiled into the program."""
        return clones(self._executor.frozen)

    def save_adapter(self, directory: str | Path) -> Path:
        """Write the adapter as PEFT would, so that no reader ever sees half of it; returns the directory.

        Directories, keys and configurations are those of PEFT's ``save_pretrained`` when the model was compiled. A
        model without PEFT gets ``adapter_model.safetensors`` alone: its LoRA factors under their own FQNs.

        Raises:
            AdapterError: the path is a file, or the file system refuses.
            NonFiniteAdapterError: the adapter holds NaN or infinity.
        """
        finite.check_adapter(self._executor.adapter)
        adapter_io.save_adapter(Path(directory), self.manifest.files, self._all_tensors())
        return Path(directory)

    def check_writable(self, directory: str | Path) -> None:
        """Check that :meth:`save_adapter` could write there now; leaves nothing behind.

        Raises:
            AdapterError: the path is a file, or the file system refuses.
        """
        adapter_out.check_writable(Path(directory), self._all_tensors())

    def load_adapter(self, directory: str | Path) -> None:
        """Take the adapter from a directory that :meth:`save_adapter` or PEFT wrote for this model.

        Raises:
            AdapterError: unreadable, unfit, or with other frozen tensors than the program was compiled with.
        """
        executor = self._executor
        self._take(adapter_io.load_adapter(Path(directory), self.manifest, executor.initial, executor.frozen))

    def _all_tensors(self) -> dict[str, Tensor]:
        return {**self._executor.adapter, **self._executor.frozen}

    # Training

    def fit(
        self,
        batches: Batches,
        steps: int,
        lr: float | Schedule,
        eps: float | Schedule | None = None,
        seed: int = 0,
        journal: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        fsync: FsyncPolicy = "step",
        snapshot_every: int | None = 500,
        eval_batches: Iterable[AnyBatch] | None = None,
        eval_every: int | None = None,
        label_ids: Sequence[int] | None = None,
        progress: bool | None = None,
        workers: Workers | None = None,
    ) -> FitResult:
        """Train the adapter for ``steps`` steps in all.

        Args:
            batches: a sequence of batches (cycled), a ``torch.utils.data.DataLoader`` or another iterable of known
                length (an epoch after the other), an object with ``batch(step)``, or any other iterable (consumed
                once). A batch is a dict of tensors by name, or a list of all in the order of ``manifest.batch.inputs``.
                A DataLoader needs ``drop_last=True`` where its data do not fill the last batch.
                Every tensor has the dtype and shape in the manifest.
            steps: length of the run, steps already in the journal included.
            lr: a number, or a function of the step number; rounded to float32.
            eps: likewise. A program of exact gradients, or of directional derivatives, has none.
            seed: the run's seed; each step's own is :func:`runtime_driver.step_seed` of it.
            journal: a file that gets one line per step. If it exists, its steps are replayed without the model and the
                run goes on after them, to the same bits as a run that was never interrupted. Steps of exact gradients
                after the last snapshot are computed again, from their batches, and compared with the journal.
            callbacks: observers, called in order.
            fsync: ``"step"``: each record reaches the disk before the next step; N: every N-th; ``"none"``: no sync.
            snapshot_every: with a journal, keep the adapter beside it every so many steps, so that a resume need not
                replay from the first. None: never.
            eval_batches: a list or a DataLoader, evaluated at the end, and every ``eval_every`` steps.
            label_ids: also measure accuracy, see :meth:`evaluate`.
            progress: show a progress bar, in a notebook below the cell, elsewhere on stderr; None: in a notebook or if
                stderr is a terminal, and of several workers on the first.
            workers: train together with other processes (:class:`runtime_driver.fleet.Workers`). Each calls ``fit``
                with the same settings and its own batches; worker 0 writes the journal, and evaluates.

        Ctrl-C lets the running step finish, then returns a result with ``interrupted=True``; a second Ctrl-C raises
        KeyboardInterrupt at once. Either way the journal is whole and the adapter is that of the last completed step.

        Raises:
            WeightsFileError: before anything is written.
            HyperparameterError, BatchError, LabelError, DataExhaustedError: before the step in question runs.
            JournalMismatchError, JournalCorruptError, JournalLockedError, JournalError: the journal cannot be used.
            NonFiniteLossError, NonFiniteAdapterError: NaN or infinity; journal and adapter stay at the last completed
                step, and the error has the last adapter with a finite loss. A resumed run stops at the same step again.
            InternalStateError: the program holds its adapter inside, and it is not the one that the run would go on
                from: a resumed journal's, or a loaded one.
            FleetError: workers that do not fit together, are lost, or whose adapters differ.
        """
        observers = list(callbacks)
        first = workers is None or workers.rank == 0
        if progress or (progress is None and first):
            observers[:0] = progress_bars(asked=bool(progress))
        options = RunOptions(
            steps=steps,
            lr=as_schedule(lr),
            eps=None if self._checked_eps(eps) is None else as_schedule(eps),  # pyright: ignore[reportArgumentType]
            seed=seed,
            journal=None if journal is None else Path(journal),
            fsync=fsync,
            snapshot_every=snapshot_every,
            eval_batches=eval_batches,
            eval_every=eval_every,
            label_ids=label_ids,
            workers=workers,
        )
        return TrainingRun(self._executor, batches, options, observers).run()

    def step(
        self, batch: Batch, seed: int | None = None, lr: float = 1e-3, eps: float | None = None, *, update: bool = True
    ) -> StepOutput:
        """One step; the session takes the new adapter and optimizer's state unless ``update`` is false.

        Args:
            seed: ``0 <= seed < 2**31``; neither it nor ``eps`` for a program of exact gradients, no ``eps`` for one of
                directional derivatives.

        Raises:
            HyperparameterError, BatchError, LabelError: before the step runs.
            NonFiniteLossError, NonFiniteAdapterError: NaN or infinity; the session keeps its adapter.
            InternalStateError: the program holds another adapter inside than the session's.
        """
        inputs, _ = self._executor.binder.bind("step", batch)
        lr, radius = checked("lr", lr, positive=False), self._checked_eps(eps)
        if self._executor.exact and seed is not None:
            raise HyperparameterError("seed", "no value for a program of exact gradients, which draws nothing", seed)
        number = 0 if self._executor.exact else _checked_seed(seed)
        positive = 0.0 if radius is None else checked("eps", float(radius), positive=True)  # pyright: ignore[reportArgumentType]
        output = self._executor.step(inputs, number, lr, positive)
        if update:
            self._executor.adopt({**output.adapter, **output.optimizer})
        return output

    def _checked_eps(self, eps: float | Schedule | None) -> float | Schedule | None:
        """Raises :class:`HyperparameterError` where a program needs a radius and has none, or the other way round."""
        if not self._executor.perturbs and eps is not None:
            kind = "exact gradients" if self._executor.exact else "directional derivatives"
            raise HyperparameterError("eps", f"no value for a program of {kind}, which perturbs nothing", eps)
        if self._executor.perturbs and eps is None:
            raise HyperparameterError("eps", "a number > 0, the radius of the perturbation", eps)
        return eps

    def apply(self, seed: int, lr: float, projected_gradients: Sequence[float]) -> None:
        """Do the update of a step from its scalars, without the model.

        Raises:
            HyperparameterError: out of range, or not one projected gradient per query.
            NonFiniteAdapterError: the update overflows; the session's adapter stays.
        """
        values = [float(value) for value in projected_gradients]
        queries = self.manifest.estimator.queries
        if len(values) != queries or not all(math.isfinite(value) for value in values):
            raise HyperparameterError("projected_gradients", f"{queries} finite numbers", values)
        executor, lr = self._executor, checked("lr", lr, positive=False)
        executor.adopt(executor.apply(executor.state, _checked_seed(seed), lr, values))

    def replay(self, journal: str | Path, steps: int | None = None) -> int:
        """Set the adapter to that of a journal after ``steps`` of its steps (None: all); returns their number.

        Starts from the adapter the run began with: the one in the .pte, the session's own, or the one kept beside the
        journal, whichever has the hash in its header.

        Raises:
            JournalError, JournalCorruptError: unreadable, damaged, or shorter than ``steps``.
            JournalMismatchError: of another program.
            NotReplayableError: of exact gradients.
            AdapterError: the adapter that the run started from is not to be had.
            NonFiniteAdapterError: a step's update overflows (earlier releases recorded such steps).

        Warns:
            SnapshotWarning: the snapshot beside the journal cannot be used.
            UnprovenWarning: the journal is of format 1.
        """
        path, executor = Path(journal), self._executor
        contents = read_journal(path)
        resume.check_program(path, contents.header, self.manifest)
        if executor.exact:
            raise NotReplayableError(path)
        own = [executor.initial, executor.adapter]
        initial = resume.initial_adapter(path, contents.header, self.manifest, own)
        begun = {**initial, **executor.fresh_optimizer()}
        executor.adopt(resume.replay(path, contents, self.manifest, begun, executor.apply_record, steps))
        return len(contents.records) if steps is None else steps

    # Use

    def evaluate(
        self, batches: Iterable[AnyBatch], *, label_ids: Sequence[int] | None = None, loss: bool = True
    ) -> Evaluation:
        """Loss, and accuracy if ``label_ids`` are given, over batches, of a list or a DataLoader.

        The loss is what the model's own loss function gives on all examples in one batch, however they are cut into
        batches: a mean over examples weighs rows, a mean over tokens labelled positions, and a sum adds up. A batch may
        have fewer rows than the compiled size. An input that holds no batch and divides a sum, such as Hugging Face's
        ``num_items_in_batch``, counts what is in its own batch. A loss that does not come apart so (it says why) is
        given for one whole batch only.

        Args:
            label_ids: the logits' column for each label value; the prediction is the highest of them at the last
                position. The batch's label input has shape [B].
            loss: whether to run the ``loss`` method; without it only ``logits`` is loaded.

        Raises:
            BatchError, LabelError: a batch that does not fit, or none at all.
        """
        return evaluate(self._executor, batches, loss=loss, label_ids=label_ids)

    def batch_loss(self, batch: Batch) -> float:
        """The loss of one batch, unperturbed, of at most the compiled number of rows: the model's own loss of them.

        Raises:
            BatchError, LabelError: the batch does not fit, or it is incomplete and the program's loss can't be given
                for fewer rows.
        """
        losses = Losses(self.manifest, self._executor.binder)
        losses.add(batch, *self._executor.loss_outputs(batch))
        return losses.value

    def predict(self, batch: Batch) -> Tensor:
        """The logits of one batch; label inputs may be left out. Raises :class:`BatchError`.

        A batch may have fewer rows than the compiled size; the result then has as many.
        """
        return self._executor.predict(batch)

    def release(self, *methods: str) -> None:
        """Free the memory of these methods, or of all; they are loaded again when needed.

        A ``step`` that holds its adapter inside starts from the initial one when it is loaded again.
        """
        for method in methods or self.program.resident_methods():
            self.program.release(method)


def _checked_seed(seed: int | None) -> int:
    if seed is None or not 0 <= seed < 1 << 31:
        raise HyperparameterError("seed", "an integer in [0, 2**31)", seed)
    return seed
