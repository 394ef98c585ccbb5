"""Every error the driver raises on purpose. Each message says what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver.format.errors import DriverError
from runtime_driver.format.errors import HyperparameterError as HyperparameterError

if TYPE_CHECKING:
    from torch import Tensor


class DriverWarning(UserWarning):
    """Base of what the driver says about a run that goes on."""


class UnprovenWarning(DriverWarning):
    """A file of format 1, which cannot prove that it is undamaged."""


class SnapshotWarning(DriverWarning):
    """A snapshot that is damaged or not this journal's, and so is not used."""


class RefusedWarning(DriverWarning):
    """A worker's contribution that does not count."""


class ProgramFileError(DriverError):
    """A .pte file that is missing, truncated, not a .pte, not one of ours, or refused by the runtime."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}. {remedy}")


class WeightsFileError(DriverError):
    """A weights file (.ptd) that is missing, truncated, of another program, or given to a program that has none."""

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}. {remedy}")


class BackendLibraryError(DriverError):
    """A shared library with a delegate's backend that cannot be loaded."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(
            f"{path}: {problem}. Give a shared library with a backend, built for this machine and the installed "
            "ExecuTorch."
        )


class SidecarMismatchError(DriverError):
    """The ``.json`` beside a .pte disagrees with the manifest inside it, or with the program's size or hash."""

    def __init__(
        self, path: Path, field: str, inside: object, beside: object, source: str = "the manifest inside the .pte says"
    ) -> None:
        self.path = path
        self.field = field
        super().__init__(
            f"{path}: field `{field}` is {beside!r}, but {source} {inside!r}. "
            "The two files come from different programs: copy both from the same place, or delete the .json."
        )


class MissingMethodError(DriverError):
    """The program has no such method."""

    def __init__(self, method: str, available: list[str]) -> None:
        self.method = method
        super().__init__(
            f"The program has no method `{method}`; it has {available}. Lower the model again with that method."
        )


class ExecutionError(DriverError):
    """The runtime reported a failure while a method ran."""

    def __init__(self, method: str, reason: str) -> None:
        self.method = method
        super().__init__(
            f"Method `{method}` failed in the runtime: {reason}. The runtime's own log, above on stderr, names the "
            "operator; lowering for the `portable` target tells a delegate's fault from the program's."
        )


class BatchError(DriverError):
    """A batch that the program cannot take."""

    def __init__(self, name: str, problem: str, remedy: str) -> None:
        self.name = name
        super().__init__(f"Batch input `{name}`: {problem}. {remedy}")


class LabelError(BatchError):
    """Labels outside their range, or more labelled positions than the program reads."""


class DataExhaustedError(DriverError):
    """The batches ran out before the last step."""

    def __init__(self, step: int, steps: int | None = None) -> None:
        self.step = step
        of_all = "" if steps is None else f" of {steps}"
        super().__init__(
            f"The batches ended before step {step}{of_all}. Pass a list (it is cycled) or an object with "
            "`batch(step)`, or ask for fewer steps."
        )


class InternalStateError(DriverError):
    """A step of a program that holds its adapter inside, where the session has another adapter."""

    def __init__(self) -> None:
        super().__init__(
            "This program holds its adapter inside, where it cannot be set; the session's adapter is neither that one "
            "nor the initial one, so a step would train another adapter. Go on in the session that made the last step, "
            "start from the initial adapter, or lower the model with adapter='external', which can resume a journal "
            "and load adapters."
        )


class AdapterError(DriverError):
    """Adapter tensors that do not fit the program, or an adapter directory that cannot be read or written."""


class JournalError(DriverError):
    """Base of the journal's errors."""


class JournalCorruptError(JournalError):
    """A journal line that is not what the driver wrote."""

    def __init__(self, path: Path, line: int, problem: str) -> None:
        self.path = path
        self.line = line
        super().__init__(
            f"{path}, line {line}: {problem}. Restore the file from a copy, or cut it before that line to resume there."
        )


class JournalMismatchError(JournalError):
    """A journal of another run: another program, other hyper-parameters, another initial adapter or other data."""

    def __init__(self, path: Path, field: str, journal: object, session: object) -> None:
        self.path = path
        self.field = field
        super().__init__(
            f"{path}: `{field}` is {journal!r} in the journal, but {session!r} in this session. "
            "Continue with the journal's value, or give a new journal file."
        )


class JournalLockedError(JournalError):
    """Another process writes this journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path}: another process is writing this journal. Wait for it, or give another file.")


class NotReplayableError(JournalError):
    """A journal of exact gradients: what a step did is not known from the few numbers of its record."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            f"{path}: a journal of exact gradients: its records hold losses and hashes, and not what makes an adapter. "
            "Run fit (mobizo train) with this journal and the same batches: it recomputes the steps after the last "
            "snapshot, to the same bits. Or load the adapter that the run saved."
        )


class RecomputedError(JournalError):
    """A step that a resumed run computed again did not give what its journal has."""

    def __init__(self, path: Path, step: int, what: str, found: object, recorded: object) -> None:
        self.path = path
        self.step = step
        super().__init__(
            f"{path}: step {step}, computed again, gives the {what} {found}, the journal has {recorded}. Resume on the "
            "machine, with the runtime and with the batches of the run; or start another journal."
        )


class FleetError(DriverError):
    """Base of what can go wrong between workers."""


class NoProjectedGradientsError(FleetError):
    """A program whose steps do not follow from a seed and a few numbers, so that several workers can't share them."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(
            f"This program can't be trained by several workers: {reason}. "
            + (remedy or "Lower the model with a two-sided, one-sided or forward gradient, and adapter='external'.")
        )


class WorkerMismatchError(FleetError):
    """A worker that was started with another program or other settings than worker 0."""

    def __init__(self, worker: int, field: str, found: object, first: object) -> None:
        self.worker = worker
        self.field = field
        super().__init__(
            f"Worker {worker} has {found!r} as `{field}`, worker 0 has {first!r}. Start all workers with the same."
        )


class AdapterDivergedError(FleetError):
    """Workers whose adapter is no longer that of the others, although all got the same contributions."""

    def __init__(self, step: int, workers: Sequence[int], own: int) -> None:
        self.step = step
        self.workers = tuple(workers)
        super().__init__(
            f"After {step} steps the adapter of worker {', '.join(map(str, workers))} differs from the others'"
            f"{' (that is this worker)' if own in workers else ''}. The run stops; a restarted one replays the "
            "journal. If it happens again, that worker's processor or runtime computes updates differently: leave it "
            "out."
        )


class AllRefusedError(FleetError):
    """A step to which no worker contributed anything that counts."""

    def __init__(self, step: int, refusals: Sequence[str]) -> None:
        self.step = step
        super().__init__(
            f"No contribution to step {step} counts ({'; '.join(refusals[:4])}). Check the data, or try a smaller "
            "learning rate or epsilon."
        )


class WorkerLostError(FleetError):
    """Another worker does not answer any more."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(
            f"Worker {rank} lost the others: {' '.join(reason.split())[:200]} Under torchrun --max-restarts N, all "
            "workers start again and replay the journal."
        )


class NonFiniteError(DriverError):
    """A step gave NaN or infinity.

    Attributes:
        step: the number of the step; None outside of a run.
        last_good: the last adapter that a finite loss was measured for, by FQN; None if there is none, and outside of a
            run. After a loss that is not finite this is the adapter before the run's last update, one step before the
            session's, which stays at the end of the journal.
        good_steps: the number of steps that led to ``last_good``.
    """

    def __init__(self, step: int | None, message: str) -> None:
        self.step = step
        self.last_good: dict[str, Tensor] | None = None
        self.good_steps: int | None = None
        super().__init__(message)


class NonFiniteLossError(NonFiniteError):
    """A loss or a projected gradient is NaN or infinite; the update was not made.

    Attributes:
        outputs: which outputs of the step are not finite.
        before_any_update: whether the program gave it with the adapter that the run started from.
    """

    def __init__(
        self,
        step: int | None,
        loss: float,
        projected_gradients: list[float],
        *,
        outputs: Sequence[str] = (),
        bad_inputs: Sequence[str] = (),
        before_any_update: bool = False,
    ) -> None:
        self.loss = loss
        self.projected_gradients = projected_gradients
        self.outputs = tuple(outputs)
        self.before_any_update = before_any_update
        where = "The step" if step is None else f"Step {step}"
        shown = f"{_some(projected_gradients)}, which are not all finite"
        found = f"{where} gave a loss of {loss} and projected gradients {shown}"
        super().__init__(step, f"{found}. {self._remedy(bad_inputs)}")

    def _remedy(self, bad_inputs: Sequence[str]) -> str:
        if bad_inputs:
            return f"Batch input {_some(bad_inputs)} holds NaN or infinity: correct the data."
        if not self.before_any_update:
            return "Try a smaller learning rate or epsilon, and check the batch."
        if set(self.outputs) == {"projected_gradients"}:
            return "The losses are finite, and nothing was updated yet: try a larger epsilon."
        return (
            f"Nothing was updated yet: the program gives this with the adapter that the run starts from, in "
            f"{_some(self.outputs)}. Check the batch and that adapter, or lower the model for another target or "
            "precision: `portable` computes in float32 as the model does."
        )


class NonFiniteAdapterError(NonFiniteError):
    """An update gives an adapter with NaN or infinity; it was not made.

    Attributes:
        tensor: FQN of the first tensor that is not finite.
        count: how many of its values are not.
    """

    def __init__(self, step: int | None, tensor: str, count: int, size: int) -> None:
        self.tensor = tensor
        self.count = count
        where = "The update" if step is None else f"The update of step {step}"
        super().__init__(
            step,
            f"{where} gives an adapter that is not finite: {count} of {size} values of `{tensor}` are NaN or infinite. "
            "The adapter before it is kept. Try a smaller learning rate; in a replay, ask for fewer steps.",
        )


def _some(values: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(f"`{value}`" if isinstance(value, str) else str(value) for value in values[:most])
    shown = shown + (f" and {len(values) - most} more" if len(values) > most else "")
    return shown if values and isinstance(values[0], str) else f"[{shown}]"
