"""A session: one .pte, one adapter, and what can be done with them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver import adapter_io, adapter_out, finite, resume
from runtime_driver.batches import BatchBinder
from runtime_driver.errors import BatchError, HyperparameterError, InternalStateError, MissingMethodError
from runtime_driver.evaluation import Losses, evaluate
from runtime_driver.journal import FsyncPolicy, read_journal
from runtime_driver.program import LoadedProgram
from runtime_driver.results import Evaluation, FitResult, StepOutput
from runtime_driver.schedule import Schedule, as_schedule, checked
from runtime_driver.training import RunOptions, TrainingRun

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import Batch, Batches
    from runtime_driver.callbacks import Callback
    from runtime_driver.format import Manifest
    from runtime_driver.format.records import Record


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
            verify: compare the program's SHA-256 with the one in its seal before the runtime sees it, and that of the
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
        self.binder = BatchBinder(self.manifest)
        stored = self.program.initial_adapter()
        self._initial = {spec.fqn: stored[spec.fqn] for spec in self.manifest.trainable_adapter}
        self._frozen = {spec.fqn: stored[spec.fqn] for spec in self.manifest.frozen_adapter}
        self._adapter = dict(self._initial)
        # The adapter that a loaded `step` holds, if it holds one; None while it is not known.
        self._inside: dict[str, Tensor] | None = self._initial

    # The adapter

    @property
    def adapter(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors by FQN, in the manifest's order. Assign a dict to replace them all.

        Raises:
            AdapterError: on assignment of missing, unknown, unfit or non-finite tensors.
        """
        return {fqn: tensor.clone() for fqn, tensor in self._adapter.items()}

    @adapter.setter
    def adapter(self, value: Mapping[str, Tensor]) -> None:
        self._adapter = adapter_io.checked_adapter(self.manifest.trainable_adapter, value)

    @property
    def initial_adapter(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors stored in the .pte."""
        return {fqn: tensor.clone() for fqn, tensor in self._initial.items()}

    @property
    def frozen_adapter(self) -> dict[str, Tensor]:
        """Copies of the frozen LoRA tensors (``lora_A`` by default); they are compiled into the program."""
        return {fqn: tensor.clone() for fqn, tensor in self._frozen.items()}

    def save_adapter(self, directory: str | Path) -> Path:
        """Write the adapter as PEFT would, so that no reader ever sees half of it; returns the directory.

        Directories, keys and configurations are those of PEFT's ``save_pretrained`` when the model was compiled. A
        model without PEFT gets ``adapter_model.safetensors`` alone: its LoRA factors under their own FQNs.

        Raises:
            AdapterError: the path is a file, or the file system refuses.
            NonFiniteAdapterError: the adapter holds NaN or infinity.
        """
        finite.check_adapter(self._adapter)
        adapter_io.save_adapter(Path(directory), self.manifest.files, {**self._adapter, **self._frozen})
        return Path(directory)

    def check_writable(self, directory: str | Path) -> None:
        """Check that :meth:`save_adapter` could write there now; leaves nothing behind.

        Raises:
            AdapterError: the path is a file, or the file system refuses.
        """
        adapter_out.check_writable(Path(directory), {**self._adapter, **self._frozen})

    def load_adapter(self, directory: str | Path) -> None:
        """Take the adapter from a directory that :meth:`save_adapter` or PEFT wrote for this model.

        Raises:
            AdapterError: unreadable, unfit, or with other frozen tensors than the program was compiled with.
        """
        self._adapter = adapter_io.load_adapter(Path(directory), self.manifest, self._initial, self._frozen)

    # Training

    def fit(
        self,
        batches: Batches,
        steps: int,
        lr: float | Schedule,
        eps: float | Schedule,
        seed: int = 0,
        journal: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        fsync: FsyncPolicy = "step",
        snapshot_every: int | None = 500,
        eval_batches: Sequence[Batch] | None = None,
        eval_every: int | None = None,
        label_ids: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> FitResult:
        """Train the adapter for ``steps`` steps in all.

        Args:
            batches: a sequence of dicts of tensors (cycled), an object with ``batch(step)``, or any other iterable of
                dicts (consumed once). Every tensor has the dtype and shape in the manifest.
            steps: length of the run, steps already in the journal included.
            lr, eps: numbers, or functions of the step number; rounded to float32.
            seed: the run's seed; each step's own is :func:`runtime_driver.step_seed` of it.
            journal: a file that gets one line per step. If it exists, its steps are replayed without the model and the
                run goes on after them, to the same bits as a run that was never interrupted.
            callbacks: observers, called in order.
            fsync: ``"step"``: each record reaches the disk before the next step; N: every N-th; ``"none"``: no sync.
            snapshot_every: with a journal, keep the adapter beside it every so many steps, so that a resume need not
                replay from the first. None: never.
            eval_batches: evaluated at the end, and every ``eval_every`` steps.
            label_ids: also measure accuracy, see :meth:`evaluate`.
            progress: show a progress bar on stderr; None: if stderr is a terminal.

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
        """
        observers = list(callbacks)
        if progress or (progress is None and sys.stderr.isatty()):
            from runtime_driver.progress import ProgressBar

            observers.insert(0, ProgressBar())
        options = RunOptions(
            steps=steps,
            lr=as_schedule(lr),
            eps=as_schedule(eps),
            seed=seed,
            journal=None if journal is None else Path(journal),
            fsync=fsync,
            snapshot_every=snapshot_every,
            eval_batches=eval_batches,
            eval_every=eval_every,
            label_ids=label_ids,
        )
        return TrainingRun(self, batches, options, observers).run()

    def step(self, batch: Batch, seed: int, lr: float, eps: float, *, update: bool = True) -> StepOutput:
        """One step; the session takes the new adapter unless ``update`` is false.

        Args:
            seed: ``0 <= seed < 2**31``.

        Raises:
            HyperparameterError, BatchError, LabelError, NonFiniteLossError, NonFiniteAdapterError.
            InternalStateError: the program holds another adapter inside than the session's.
        """
        inputs, _ = self.binder.bind("step", batch)
        lr, eps = checked("lr", lr, positive=False), checked("eps", eps, positive=True)
        output = self.run_step(inputs, _checked_seed(seed), lr, eps)
        if update:
            self._adapter = output.adapter
        return output

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
        self._adapter = self._apply(self._adapter, _checked_seed(seed), checked("lr", lr, positive=False), values)

    def replay(self, journal: str | Path, steps: int | None = None) -> int:
        """Set the adapter to that of a journal after ``steps`` of its steps (None: all); returns their number.

        Starts from the adapter the run began with: the one in the .pte, the session's own, or the one kept beside the
        journal, whichever has the hash in its header.

        Raises:
            JournalError, JournalCorruptError: unreadable, damaged, or shorter than ``steps``.
            JournalMismatchError: of another program.
            AdapterError: the adapter that the run started from is not to be had.
            NonFiniteAdapterError: a step's update overflows (earlier releases recorded such steps).

        Warns:
            SnapshotWarning: the snapshot beside the journal cannot be used.
            UnprovenWarning: the journal is of format 1.
        """
        path = Path(journal)
        contents = read_journal(path)
        resume.check_program(path, contents.header, self.manifest)
        own = [self._initial, self._adapter]
        initial = resume.initial_adapter(path, contents.header, self.manifest, own)
        self._adapter = resume.replay(path, contents, self.manifest, initial, self.apply_record, steps)
        return len(contents.records) if steps is None else steps

    # Use

    def evaluate(
        self, batches: Iterable[Batch], *, label_ids: Sequence[int] | None = None, loss: bool = True
    ) -> Evaluation:
        """Loss, and accuracy if ``label_ids`` are given, over batches.

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
        return evaluate(self, batches, loss=loss, label_ids=label_ids)

    def batch_loss(self, batch: Batch) -> float:
        """The loss of one batch, unperturbed, of at most the compiled number of rows: the model's own loss of them.

        Raises:
            BatchError, LabelError: the batch does not fit, or it is incomplete and the program's loss can't be given
                for fewer rows.
        """
        losses = Losses(self.manifest, self.binder)
        losses.add(batch, *self.loss_outputs(batch))
        return losses.value

    def predict(self, batch: Batch) -> Tensor:
        """The logits of one batch; label inputs may be left out. Raises :class:`BatchError`.

        A batch may have fewer rows than the compiled size; the result then has as many.
        """
        inputs, rows = self.binder.bind("logits", batch, partial=True)
        logits = self._run("logits", self._adapter, inputs)["logits"][0]
        dim = self.manifest.batch.logits_dim
        if rows == self.manifest.batch.size:
            return logits
        if dim is None:
            raise BatchError(
                "(all)",
                f"the batch has {rows} rows, the program takes {self.manifest.batch.size}, and its logits hold the "
                "batch together with something else",
                "Fill the batch up, and leave out what belongs to the rows that you added.",
            )
        return logits.narrow(dim, 0, rows)

    def release(self, *methods: str) -> None:
        """Free the memory of these methods, or of all; they are loaded again when needed.

        A ``step`` that holds its adapter inside starts from the initial one when it is loaded again.
        """
        for method in methods or self.program.resident_methods():
            self.program.release(method)

    def loss_outputs(self, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Every output of the ``loss`` method for a batch, by name, and how many of its rows are real.

        Raises:
            BatchError, LabelError: the batch does not fit.
        """
        inputs, rows = self.binder.bind("loss", batch, partial=True)
        outputs = self._run("loss", self._adapter, inputs)
        roles = {role: iter(tensors) for role, tensors in outputs.items()}
        return {item.name: next(roles[item.role]) for item in self.manifest.methods["loss"].outputs}, rows

    # For the training loop

    def adopt(self, adapter: dict[str, Tensor]) -> None:
        """Take an adapter that a method of this program returned, unchecked."""
        self._adapter = adapter

    def check_state(self) -> None:
        """Check that a step would train the session's adapter, which a program may hold inside.

        The initial adapter can always be had again, by loading ``step`` anew.

        Raises:
            InternalStateError: the program holds another adapter.
        """
        if self.manifest.adapter_state == "external":
            return
        inside = self._inside if "step" in self.program.resident_methods() else self._initial
        if _equal(inside, self._adapter):
            return
        if not _equal(self._initial, self._adapter):
            raise InternalStateError
        self.release("step")

    def run_step(
        self, inputs: Mapping[str, Tensor], seed: int, lr: float, eps: float, number: int | None = None
    ) -> StepOutput:
        """Run ``step`` on bound inputs; the session's adapter stays.

        Raises:
            NonFiniteLossError, NonFiniteAdapterError, InternalStateError.
        """
        self.check_state()
        self._inside = None
        out = self._run("step", self._adapter, inputs, {"seed": seed, "lr": lr, "eps": eps})
        loss = float(out["loss"][0])
        gradients = tuple(float(value) for value in out["projected_gradients"][0].tolist())
        losses = tuple(float(value) for tensor in out.get("losses", ()) for value in tensor.tolist())
        first = number == 0 or _equal(self._adapter, self._initial)
        finite.check_step(number, loss, losses, gradients, inputs, before_any_update=first)
        if self.manifest.adapter_state == "external":
            adapter = self._named(out["adapter"])
            finite.check_adapter(adapter, number)
        else:
            # The same update on the same bits as inside the step.
            adapter = self._inside = self._apply(self._adapter, seed, lr, list(gradients), number)
        return StepOutput(loss, losses, gradients, adapter)

    def apply_record(self, adapter: dict[str, Tensor], record: Record) -> dict[str, Tensor]:
        """The adapter after a journal record's step. Raises :class:`NonFiniteAdapterError`."""
        return self._apply(adapter, record.seed, record.lr, list(record.projected_gradients), record.step)

    def _apply(
        self, adapter: dict[str, Tensor], seed: int, lr: float, gradients: list[float], number: int | None = None
    ) -> dict[str, Tensor]:
        out = self._run("apply", adapter, {}, {"seed": seed, "lr": lr, "projected_gradients": gradients})
        result = self._named(out["adapter"])
        finite.check_adapter(result, number)
        return result

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._initial, tensors, strict=True))

    def _run(
        self,
        method: str,
        adapter: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        scalars: Mapping[str, int | float | list[float]] | None = None,
    ) -> dict[str, list[Tensor]]:
        """Run a method with its inputs bound by role and name; outputs by role."""
        import torch

        spec = self.manifest.methods.get(method)
        if spec is None:
            raise MissingMethodError(method, sorted(self.manifest.methods))
        tensors: list[Tensor] = []
        for item in spec.inputs:
            if item.role == "adapter":
                tensors.append(adapter[item.name])
            elif item.role == "batch":
                tensors.append(inputs[item.name])
            else:
                value = torch.tensor((scalars or {})[item.role], dtype=getattr(torch, item.dtype))
                tensors.append(value.reshape(item.shape))
        outputs: dict[str, list[Tensor]] = {}
        for item, tensor in zip(spec.outputs, self.program.execute(method, tensors), strict=True):
            outputs.setdefault(item.role, []).append(tensor)
        return outputs


def _equal(left: Mapping[str, Tensor] | None, right: Mapping[str, Tensor]) -> bool:
    import torch

    return left is right or (left is not None and all(torch.equal(left[fqn], right[fqn]) for fqn in right))


def _checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 31:
        raise HyperparameterError("seed", "an integer in [0, 2**31)", seed)
    return seed
