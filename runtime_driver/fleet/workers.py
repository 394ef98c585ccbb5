"""Workers that train one adapter together, each with its own copy that is never sent."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, cast

from runtime_driver.batches import BatchReader
from runtime_driver.errors import (
    AdapterDivergedError,
    AllRefusedError,
    DataExhaustedError,
    FleetError,
    HyperparameterError,
    NoProjectedGradientsError,
    RefusedWarning,
    WorkerMismatchError,
)
from runtime_driver.fleet.channel import Channel, TorchChannel
from runtime_driver.fleet.gate import Gate
from runtime_driver.fleet.messages import Message, program_tag
from runtime_driver.format.contributions import RULES, Contribution
from runtime_driver.format.seeds import step_seed, worker_seed

if TYPE_CHECKING:
    from runtime_driver.batches import Batch, Batches
    from runtime_driver.format import Manifest
    from runtime_driver.format.records import Record

#: "data": the same noise, each worker's own batch; "queries": the same batch, each worker's own noise.
Mode = Literal["data", "queries"]
_HASH_BYTES = 8
_SETTINGS_BYTES = 1024


class Workers:
    """The workers of one run. Use as a context manager, and give it to :meth:`runtime_driver.Session.fit`.

    At each step every worker sends one :class:`runtime_driver.fleet.messages.Message` and gets everyone's. From the
    same messages in the same order, each computes the same update: adapters stay equal to the bit and are never sent.

    Attributes:
        rank, size: this worker's number, and how many there are.
        step_bytes: bytes that this worker sends in a step; the all-gather passes each message on to every other worker.
        sent_bytes: bytes sent in all, hashes and settings included, a shared journal not.
        refused: how many contributions of each worker did not count.
    """

    def __init__(
        self,
        mode: Mode = "data",
        combine: str = "mean",
        *,
        hash_every: int = 50,
        limit: float | None = 20.0,
        timeout: float = 600.0,
        channel: Channel | None = None,
    ) -> None:
        """Join the group that torchrun made.

        Args:
            combine: ``"mean"`` (weighted by labelled positions), ``"median"`` or ``"trimmed_mean"``; the last two bear
                a minority of bad workers that no check finds.
            hash_every: compare 8 bytes of the adapter's hash every so many steps.
            limit: see :class:`runtime_driver.fleet.Gate`.
            timeout: seconds after which a worker that does not answer is lost.
            channel: another transport than torch.distributed.

        Raises:
            HyperparameterError: an argument out of range.
            FleetError: not started by torchrun.
        """
        if mode not in ("data", "queries"):
            raise HyperparameterError("mode", "'data' or 'queries'", mode)
        if combine not in RULES or (mode == "queries" and combine != "mean"):
            known = ["mean"] if mode == "queries" else sorted(RULES)
            raise HyperparameterError("combine", f"one of {known} with mode {mode!r}", combine)
        if hash_every < 1:
            raise HyperparameterError("hash_every", "a number >= 1", hash_every)
        self.mode: Mode = mode
        self.combine = combine
        self._hash_every, self._limit = hash_every, limit
        self._channel = TorchChannel(timeout) if channel is None else channel
        self.rank, self.size = self._channel.rank, self._channel.size
        self._gate: Gate | None = None
        self._program = b""
        self.step_bytes = self.sent_bytes = 0
        self.stopping = False

    @property
    def refused(self) -> Counter[int]:
        """How many contributions of each worker did not count."""
        return Counter() if self._gate is None else self._gate.refused

    def join(self, manifest: Manifest, settings: Mapping[str, object]) -> None:
        """Begin a run: all workers have to mean the same one.

        Raises:
            NoProjectedGradientsError: the program can't take part.
            WorkerMismatchError: a worker has another program or other settings than worker 0.
        """
        check_program(manifest, self.mode)
        self._program = program_tag(manifest)
        self._gate = Gate(self._program, manifest.estimator.queries, self._limit)
        self.stopping = False
        own = {
            "program_id": manifest.program_id,
            "mode": self.mode,
            "combine": self.combine,
            "hash_every": self._hash_every,
            "limit": self._limit,
            **settings,
        }
        text = json.dumps(own).encode()
        if len(text) > _SETTINGS_BYTES:
            raise FleetError(f"The run's settings take {len(text)} bytes, expected at most {_SETTINGS_BYTES}.")
        first, *rest = [json.loads(each) for each in self._gather(text.ljust(_SETTINGS_BYTES))]
        for worker, other in enumerate(rest, start=1):
            for name in first | other:
                if first.get(name) != other.get(name):
                    raise WorkerMismatchError(worker, name, other.get(name), first.get(name))

    def same_everywhere(self, value: str | None) -> str | None:
        """A SHA-256 that all workers have; None if they do not."""
        found = set(self._gather((value or "").encode().ljust(64)[:64]))
        return value if len(found) == 1 else None

    def share_journal(self, data: bytes) -> bytes:
        """Worker 0's journal on every worker: one that joins late replays it."""
        return self._channel.broadcast(data)

    def resumed(self, records: tuple[Record, ...]) -> None:
        """Learn from the journal what sizes are usual."""
        for record in records[-64:]:
            self._known_gate.learn(record.contributions)

    def seed(self, run_seed: int, step: int, worker: int | None = None) -> int:
        """The seed that a worker (None: this one) uses at a step."""
        own = self.rank if worker is None else worker
        return step_seed(run_seed, step) if self.mode == "data" else worker_seed(run_seed, step, own)

    def exchange(self, run_seed: int, step: int, own: Contribution, *, stop: bool) -> tuple[Contribution, ...]:
        """Send this worker's contribution, and get all that count. ``stop``: end the run after this step.

        Warns:
            RefusedWarning: on worker 0 and on the one whose contribution is refused, at its 1st, 2nd, 4th, 8th, ...

        Raises:
            AllRefusedError: none counts.
            WorkerLostError: a worker does not answer.
        """
        before = self.sent_bytes
        packed = self._gather(Message.of(self._program, step, own, stop=stop).pack())
        self.step_bytes = self.sent_bytes - before
        gate = self._known_gate
        accepted, refusals = gate.check(step, dict(enumerate(packed)), lambda rank: self.seed(run_seed, step, rank))
        self.stopping = any(map(Message.asks_to_stop, packed))
        for refusal in refusals:
            count = gate.refused[refusal.worker]
            if self.rank in (0, refusal.worker) and count & (count - 1) == 0:
                warnings.warn(f"Refused {refusal} ({count} of this worker's so far).", RefusedWarning, stacklevel=2)
        if not accepted:
            raise AllRefusedError(step, [str(refusal) for refusal in refusals])
        gate.learn(accepted)
        return accepted

    def check_hash(self, step: int, sha256: str) -> None:
        """Compare the hash of the state after ``step`` steps.

        Raises:
            AdapterDivergedError: on every worker, naming those that differ from most, or from worker 0 where none are
                most.
        """
        found = self._gather(bytes.fromhex(sha256)[:_HASH_BYTES])
        counts = Counter(found)
        most = max(counts.values())
        usual = found[0] if counts[found[0]] == most else counts.most_common(1)[0][0]
        others = [worker for worker, value in enumerate(found) if value != usual]
        if others:
            raise AdapterDivergedError(step, others, self.rank)

    def hash_due(self, step: int, steps: int) -> bool:
        """Whether hashes are compared after ``step`` of ``steps`` steps."""
        return step == steps or step % self._hash_every == 0

    def close(self) -> None:
        """Leave the group."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _known_gate(self) -> Gate:
        if self._gate is None:
            raise FleetError("These workers have not joined a run. Give them to Session.fit.")
        return self._gate

    def _gather(self, data: bytes) -> list[bytes]:
        self.sent_bytes += len(data) * (self.size - 1)
        return self._channel.gather(data)


def check_program(manifest: Manifest, mode: Mode = "data") -> None:
    """Raises :class:`NoProjectedGradientsError` for a program whose steps are not known from few numbers."""
    if manifest.estimator.queries == 0:
        raise NoProjectedGradientsError("its gradient is exact, so that a step has no projected gradients to send")
    if manifest.adapter_state != "external":
        raise NoProjectedGradientsError("it holds its adapter inside, where only its own gradients reach it")
    if mode == "queries" and manifest.optimizer is not None:
        raise NoProjectedGradientsError(
            f"its optimizer is {manifest.optimizer.kind}, and queries of several workers are applied one after "
            "another, which is one step of plain SGD only",
            "Use mode 'data' (--parallel data), or lower with --optimizer sgd.",
        )


class Shard:
    """One worker's part of batches that all workers can read: of each ``size`` in turn the one at ``rank``.

    An iterable, such as a DataLoader, is read once an epoch, and the batches of other workers are skipped. It has to
    give the same batches in the same order on every worker: a DataLoader that shuffles needs a seeded ``generator``.
    """

    def __init__(self, batches: Batches, rank: int, size: int) -> None:
        self._reader, self._rank, self._size = BatchReader(batches), rank, size
        self.fingerprint: str | None = getattr(batches, "fingerprint", None)

    def batch(self, step: int) -> Batch:
        """The batch of ``step`` for this worker.

        Raises:
            BatchError: a step that an iterator has passed.
            DataExhaustedError: an iterable or an empty sequence has no more.
        """
        try:
            found = self._reader.batch(step * self._size + self._rank)
        except DataExhaustedError:
            raise DataExhaustedError(step) from None
        # Of a list the names are given by `fit`.
        return cast("Batch", found)
