"""The training loop: step, check, journal, adopt; from step 0 or from where a journal ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime_driver import resume
from runtime_driver.adapter_io import adapter_sha256
from runtime_driver.batches import BatchReader
from runtime_driver.errors import (
    HyperparameterError,
    JournalMismatchError,
    NonFiniteError,
    NonFiniteLossError,
    RecomputedError,
)
from runtime_driver.evaluation import evaluate
from runtime_driver.executor import clones
from runtime_driver.format.contributions import Contribution, combined
from runtime_driver.format.records import Header, Record
from runtime_driver.format.seeds import step_seed
from runtime_driver.interrupt import DeferredInterrupt
from runtime_driver.journal import FsyncPolicy, JournalWriter, parse_journal
from runtime_driver.memory import peak_rss_bytes
from runtime_driver.results import EvaluationRecord, FitResult, FitStart, StepRecord
from runtime_driver.schedule import Schedule, checked, describe

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import AnyBatch, Batch, Batches
    from runtime_driver.callbacks import Callback
    from runtime_driver.executor import Executor
    from runtime_driver.fleet import Workers
    from runtime_driver.journal import JournalContents

#: (step, inputs) -> its record, and the state after it.
MakeStep = Callable[[int, dict], "tuple[Record, dict[str, Tensor]]"]


@dataclass(frozen=True)
class RunOptions:
    """A run's settings, as :meth:`runtime_driver.Session.fit` documents them."""

    steps: int
    lr: Schedule
    #: None for a program that perturbs nothing.
    eps: Schedule | None
    seed: int
    journal: Path | None
    fsync: FsyncPolicy
    snapshot_every: int | None
    eval_batches: Iterable[AnyBatch] | None
    eval_every: int | None
    label_ids: Sequence[int] | None
    #: None for a run of one process.
    workers: Workers | None = None

    def __post_init__(self) -> None:
        """Raises :class:`HyperparameterError` for counts out of range."""
        if self.steps < 0:
            raise HyperparameterError("steps", "a number >= 0", self.steps)
        for name in ("snapshot_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HyperparameterError(name, "a number >= 1, or None", value)
        step_seed(self.seed, 0)
        self.lr_at(0)
        self.eps_at(0)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, as the float32 that the program gets."""
        return checked("lr", self.lr(step), positive=False)

    def eps_at(self, step: int) -> float:
        """The perturbation's radius at a step, as the float32 that the program gets; 0 where nothing is perturbed."""
        return 0.0 if self.eps is None else checked("eps", self.eps(step), positive=True)


class TrainingRun:
    """One call of ``fit``."""

    def __init__(
        self, executor: Executor, batches: Batches, options: RunOptions, callbacks: Sequence[Callback]
    ) -> None:
        self._executor = executor
        self._batches = batches
        self._options = options
        self._callbacks = callbacks
        self._workers = options.workers
        self._data: str | None = getattr(batches, "fingerprint", None)
        self._losses: list[float] = []
        # The adapter before the last update; a resumed run can ask its journal for it.
        self._before: dict[str, Tensor] | None = None
        self._replayed: Callable[[int], dict[str, Tensor]] | None = None
        # Where an exact run that is resumed computes from: its snapshot, or its start.
        self._known = 0
        self._evaluations: list[EvaluationRecord] = []

    def run(self) -> FitResult:
        """Train to the last step, or to the first Ctrl-C."""
        started = time.monotonic()
        path = self._options.journal
        # A run begins with the optimizer's state at zero: what its journal says must be all that made it.
        self._executor.optimizer = self._executor.fresh_optimizer()
        if self._workers is not None:
            self._join(self._workers)
        if path is None:
            return self._run(None, None, started)
        if self._workers is not None and self._workers.rank > 0:
            # Worker 0 writes the journal, and every other one replays what it has so far.
            return self._run(None, parse_journal(path, self._workers.share_journal(b"")), started)
        with JournalWriter(path, self._options.fsync) as journal:
            resume.remove_leftovers_beside(path)
            if self._workers is not None:
                self._workers.share_journal(path.read_bytes())
            return self._run(journal, journal.contents, started)

    def _join(self, workers: Workers) -> None:
        options = self._options
        settings = {
            "steps": options.steps,
            "lr": describe(options.lr),
            "eps": "none" if options.eps is None else describe(options.eps),
            "seed": options.seed,
            "journal": options.journal is not None,
        }
        workers.join(self._executor.manifest, settings)
        self._data = workers.same_everywhere(self._data)

    def _run(self, journal: JournalWriter | None, resumed: JournalContents | None, started: float) -> FitResult:
        options, workers = self._options, self._workers
        first = 0 if resumed is None or options.journal is None else self._resume(options.journal, resumed)
        self._check_eval_batches()
        if first < options.steps:
            self._executor.program.require_weights()
            self._executor.check_state()
        step = self._known if self._executor.exact else first
        if step < first:
            self._executor.program.require_weights()
        reader = BatchReader(self._batches, options.steps)
        header = self._header() if resumed is None else resumed.header
        if workers is not None:
            workers.check_hash(first, adapter_sha256(self._executor.state))
        with DeferredInterrupt() as interrupt, self._observed() as observed:
            self._tell("on_start", FitStart(first, options.steps, self._executor.manifest.batch.size))
            while step < options.steps and not (interrupt.requested if workers is None else workers.stopping):
                # The batch is fetched and checked before a new journal is begun: a bad call leaves no file behind.
                batch = self._executor.binder.named(reader.batch(step))
                inputs, _ = self._executor.binder.bind("step", batch)
                if journal is not None and resumed is not None and step < first:
                    self._recompute(journal.path, resumed.records[step], inputs)
                    step += 1
                    continue
                if journal is not None and resumed is None and step == 0:
                    self._begin(journal, header)
                make = self._computed if workers is None else self._shared(workers, batch, interrupt)
                record = self._step(step, inputs, make, journal, header)
                step += 1
                self._tell("on_step", record)
                if workers is not None and workers.hash_due(step, options.steps):
                    workers.check_hash(step, adapter_sha256(self._executor.state))
                if self._evaluation_due(step):
                    self._evaluate(step, interrupt)
            observed.append(
                FitResult(
                    steps=step,
                    first_step=first,
                    interrupted=step < options.steps,
                    losses=tuple(self._losses),
                    evaluations=tuple(self._evaluations),
                    seconds=time.monotonic() - started,
                    peak_memory_bytes=peak_rss_bytes(),
                )
            )
        return observed[0]

    def _step(
        self, step: int, inputs: dict, make: MakeStep, journal: JournalWriter | None, header: Header
    ) -> StepRecord:
        begun = time.monotonic()
        try:
            record, state = make(step, inputs)
        except NonFiniteError as error:
            self._name_last_good(step, error)
            raise
        seconds = time.monotonic() - begun
        if journal is not None:
            journal.append(record)
        # Only now: an adapter that is not in the journal must not be the session's.
        self._before = self._executor.adapter
        self._executor.adopt(state)
        self._losses.append(record.loss)
        every = self._options.snapshot_every
        if journal is not None and every is not None and (step + 1) % every == 0:
            resume.write_snapshot(journal.path, header, record, journal.end, state)
        gradients = record.projected_gradients
        return StepRecord(step, record.seed, record.lr, record.eps, record.loss, gradients, seconds)

    def _computed(self, step: int, inputs: dict) -> tuple[Record, dict[str, Tensor]]:
        """A step of one process, and the state after it."""
        options, executor = self._options, self._executor
        seed, lr, eps = step_seed(options.seed, step), options.lr_at(step), options.eps_at(step)
        output = executor.step(inputs, seed, lr, eps, step)
        state = {**output.adapter, **output.optimizer}
        sha256 = adapter_sha256(state) if executor.exact and options.journal is not None else ""
        return Record(step, seed, lr, eps, output.projected_gradients, output.loss, sha256), state

    def _shared(self, workers: Workers, batch: Batch, interrupt: DeferredInterrupt) -> MakeStep:
        """A step of several workers, and the state after it: the same on each."""
        options, executor = self._options, self._executor

        def make(step: int, inputs: dict) -> tuple[Record, dict[str, Tensor]]:
            lr, eps, seed = options.lr_at(step), options.eps_at(step), workers.seed(options.seed, step)
            try:
                output = executor.step(inputs, seed, lr, eps, step)
                gradients, loss = output.projected_gradients, output.loss
            except NonFiniteError:
                # The others need not stop for it: they refuse what is not finite, and say so.
                gradients, loss = (math.nan,) * executor.manifest.estimator.queries, math.nan
            own = Contribution(workers.rank, seed, float(executor.binder.labelled(batch)), gradients, loss)
            found = workers.exchange(options.seed, step, own, stop=interrupt.requested)
            applied, mean = combined(found, workers.combine)
            record = Record(step, step_seed(options.seed, step), lr, eps, applied, mean, contributions=found)
            return record, executor.apply_record(executor.state, record)

        return make

    def _recompute(self, path: Path, record: Record, inputs: dict) -> None:
        """Do a step of the journal again, and hold it to what the journal has of it."""
        executor = self._executor
        output = executor.step(inputs, record.seed, record.lr, record.eps, record.step)
        state = {**output.adapter, **output.optimizer}
        for what, found, recorded in (
            ("loss", output.loss, record.loss),
            ("state with the SHA-256", adapter_sha256(state), record.state),
        ):
            if found != recorded:
                raise RecomputedError(path, record.step, what, found, recorded)
        self._before = executor.adapter
        executor.adopt(state)

    def _name_last_good(self, step: int, error: NonFiniteError) -> None:
        """Give the error the last adapter with a finite loss."""
        if not isinstance(error, NonFiniteLossError):
            # The step's own loss was finite, only its update was not.
            error.last_good, error.good_steps = clones(self._executor.adapter), step
        elif step > 0:
            if self._before is None and self._replayed is not None:
                self._before = self._replayed(step - 1)
            error.last_good, error.good_steps = self._before, step - 1

    def _header(self) -> Header:
        options, manifest = self._options, self._executor.manifest
        return Header(
            program_id=manifest.program_id,
            seed=options.seed,
            steps=options.steps,
            lr=describe(options.lr),
            eps="none" if options.eps is None else describe(options.eps),
            noise=resume.noise_name(manifest),
            queries=manifest.estimator.queries,
            initial_adapter=adapter_sha256(self._executor.adapter),
            data=self._data,
            combine="" if self._workers is None else self._workers.combine,
        )

    def _begin(self, journal: JournalWriter, header: Header) -> None:
        """Start a new journal; an adapter that is not the .pte's own is kept beside it first."""
        if header.initial_adapter != adapter_sha256(self._executor.initial):
            resume.write_initial(journal.path, self._executor.adapter)
        journal.begin(header)

    def _resume(self, path: Path, contents: JournalContents) -> int:
        """Bring the session to the end of the journal; the number of steps in it."""
        executor, options = self._executor, self._options
        resume.check_program(path, contents.header, executor.manifest)
        current, own = executor.adapter, executor.initial
        initial = resume.initial_adapter(path, contents.header, executor.manifest, [current, own])
        wanted = replace(self._header(), initial_adapter=contents.header.initial_adapter)
        if contents.header.data == getattr(self._batches, "former_fingerprint", wanted.data):
            wanted = replace(wanted, data=contents.header.data)
        resume.check_same_run(path, contents, wanted, options.lr_at, options.eps_at)
        if len(contents.records) > options.steps:
            raise JournalMismatchError(path, "steps", len(contents.records), options.steps)

        if executor.exact:
            return self._resume_exact(path, contents, initial)
        fresh = executor.fresh_optimizer()

        def replayed(steps: int) -> dict[str, Tensor]:
            begun = {**initial, **fresh}
            return resume.replay(path, contents, executor.manifest, begun, executor.apply_record, steps)

        final = replayed(len(contents.records))
        self._replayed = lambda steps: {fqn: replayed(steps)[fqn] for fqn in own}
        # A session may stand at the run's start or at its end, not at an unrelated adapter that would be lost.
        here = adapter_sha256(current)
        last = adapter_sha256({fqn: final[fqn] for fqn in own})
        if here not in (contents.header.initial_adapter, last, adapter_sha256(own)):
            raise JournalMismatchError(path, "initial_adapter", contents.header.initial_adapter, here)
        executor.adopt(final)
        self._losses = [record.loss for record in contents.records]
        if self._workers is not None:
            self._workers.resumed(contents.records)
        return len(contents.records)

    def _resume_exact(self, path: Path, contents: JournalContents, initial: dict[str, Tensor]) -> int:
        """Start from the last snapshot; the steps after it are computed again when their batches are at hand.

        Whether the session stands at the end of the journal can't be told before, so its adapter is not asked.
        """
        executor = self._executor
        snapshot = resume.read_snapshot(path, contents, executor.manifest)
        state, self._known = ({**initial, **executor.fresh_optimizer()}, 0) if snapshot is None else snapshot
        executor.adopt(state)
        self._losses = [record.loss for record in contents.records]
        return len(contents.records)

    def _check_eval_batches(self) -> None:
        """Find what is wrong with them now, not hours later."""
        for batch in self._options.eval_batches or ():
            self._executor.binder.bind("loss", batch, partial=True)
            if self._options.label_ids is not None:
                self._executor.binder.bind("logits", batch, partial=True)

    def _evaluation_due(self, step: int) -> bool:
        options = self._options
        if options.eval_batches is None or (self._workers is not None and self._workers.rank > 0):
            return False
        return step == options.steps or (options.eval_every is not None and step % options.eval_every == 0)

    def _evaluate(self, step: int, interrupt: DeferredInterrupt) -> None:
        """Evaluate, unless Ctrl-C comes: half an evaluation is not one."""

        def until_interrupted() -> Iterator[AnyBatch]:
            for batch in self._options.eval_batches or ():
                if interrupt.requested:
                    return
                yield batch

        if interrupt.requested:
            return
        evaluation = evaluate(self._executor, until_interrupted(), loss=True, label_ids=self._options.label_ids)
        if interrupt.requested:
            return
        record = EvaluationRecord(step, evaluation)
        self._evaluations.append(record)
        self._tell("on_evaluate", record)

    @contextmanager
    def _observed(self) -> Iterator[list[FitResult]]:
        """Callbacks hear of the end however it comes."""
        result: list[FitResult] = []
        try:
            yield result
        finally:
            self._tell("on_end", result[0] if result else None)

    def _tell(self, event: str, argument: object) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(argument)
