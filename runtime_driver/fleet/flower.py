"""Federated clients with Flower: a ServerApp and a ClientApp over the driver. Needs the extra ``fleet``.

A round is some local steps. The server sends what happened since a client was last there, as seeds and projected
gradients; the client applies it (no forward pass), takes its local steps on its own data, and reports a
:class:`runtime_driver.fleet.messages.Message` for each. The server combines the reports step by step. As noise is
shared, that is the average of the clients' adapters, which nobody sends.
"""

# flwr is an extra: where it is not installed, its types are unknown. Where it is, a record's value is any of ten types.
# pyright: reportMissingImports=false, reportUnnecessaryTypeIgnoreComment=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalSubscript=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOptionalOperand=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from runtime_driver import resume
from runtime_driver.adapter_io import adapter_sha256
from runtime_driver.batches import BatchReader
from runtime_driver.errors import DriverWarning, FleetError, HyperparameterError, NonFiniteError, RefusedWarning
from runtime_driver.executor import Executor
from runtime_driver.fleet.gate import Gate, Refusal
from runtime_driver.fleet.messages import Message as Report
from runtime_driver.fleet.messages import pack_update, program_tag, unpack_update
from runtime_driver.fleet.privacy import Privacy
from runtime_driver.fleet.workers import check_program
from runtime_driver.format.contributions import RULES, Contribution, combined
from runtime_driver.format.records import Header, Record
from runtime_driver.format.seeds import step_seed
from runtime_driver.journal import JournalWriter
from runtime_driver.program import LoadedProgram
from runtime_driver.schedule import Schedule, as_schedule, checked, describe

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.batches import Batches

#: The one record in every message, in both directions.
RECORD = "mobizo"
_STATE = "mobizo-state"
#: What a client may report instead of contributions, and what makes it one that is refused.
_FAULTS = ("another program", "another adapter")


def client_app(
    program: str | Path,
    batches: Callable[[Context], Batches],
    *,
    examples: Callable[[Context], int] | None = None,
    privacy: Privacy | None = None,
) -> ClientApp:
    """The app that runs where the data is.

    Args:
        program: the .pte on the client.
        batches: the client's own data for its context, in whole batches: what :meth:`runtime_driver.Session.fit` takes.
        examples: how many examples the client has, which is its weight. None: each counts by the labelled positions of
            its batch.

    The client's copy of the adapter stays in ``context.state``, which Flower keeps at the client. What ``batches`` or
    ``examples`` raises drops the client from the round.
    """
    app = ClientApp()
    path = Path(program).absolute()

    # Flower's simulation pickles the app for every message: it must not hold an open program.
    @app.train()
    def train(message: Message, context: Context) -> Message:
        weight = None if examples is None else float(examples(context))
        opened = _opened(path, path.stat().st_mtime_ns)
        answer = _answer(opened, message.content[RECORD], context, batches, weight, privacy)
        return Message(RecordDict({RECORD: ConfigRecord(answer)}), reply_to=message)

    return app


@lru_cache(maxsize=4)
def _opened(path: Path, modified: int) -> Executor:
    """The program at ``path``, opened once a process; ``modified`` tells a file that was replaced."""
    return Executor(LoadedProgram(path))


def _answer(
    executor: Executor,
    task: ConfigRecord,
    context: Context,
    batches: Callable[[Context], Batches],
    weight: float | None,
    privacy: Privacy | None,
) -> dict:
    """What a client says to a task: its contributions, or why it has none."""
    check_program(executor.manifest)
    tag = program_tag(executor.manifest)
    if task["program"] != tag:
        return {"fault": _FAULTS[0], "known": 0}
    state, known = _known_state(executor, context, tag)
    start: int = task["start"]
    if known < start:
        # The server thought that this client knew more, for instance before it was installed anew.
        return {"fault": "behind", "known": known}
    for packed in task["updates"][known - start :]:
        seed, lr, gradients = unpack_update(packed)
        state = executor.apply(state, seed, lr, gradients)
        known += 1
    if bytes.fromhex(adapter_sha256(state))[:8] != task["hash"]:
        # What led here is not to be trusted: the next task begins with the first step.
        context.state.pop(_STATE, None)
        return {"fault": _FAULTS[1], "known": 0}
    context.state[_STATE] = ArrayRecord(state)
    context.state[RECORD] = ConfigRecord({"known": known, "program": tag})
    reader, found = BatchReader(batches(context)), list[bytes]()
    for lr, eps in zip(task["lr"], task["eps"], strict=True):
        step = known + len(found)
        seed = step_seed(task["seed"], step)
        batch = reader.batch(step)
        executor.adopt(state)
        try:
            output = executor.step(executor.binder.bind("step", batch)[0], seed, lr, eps, step)
        except NonFiniteError:
            break
        counts = float(executor.binder.labelled(batch)) if weight is None else weight
        part = Contribution(0, seed, counts, output.projected_gradients, output.loss)
        if privacy is not None:
            part = Contribution(0, seed, 1.0, privacy(output.projected_gradients), 0.0)
        found.append(Report.of(tag, step, part).pack())
        state = {**output.adapter, **output.optimizer}
    return {"contributions": found, "known": known}


def _known_state(executor: Executor, context: Context, tag: bytes) -> tuple[dict[str, Tensor], int]:
    """The adapter that this client left off with, and the number of steps in it; the initial one at first."""
    kept = context.state.get(RECORD)
    if _STATE not in context.state or kept is None or kept["program"] != tag:
        return {**executor.initial, **executor.fresh_optimizer()}, 0
    return dict(context.state.array_records[_STATE].to_torch_state_dict()), kept["known"]


@dataclass
class Server:
    """One federated run. :func:`server_app` makes the app of it.

    Attributes:
        program: the .pte.
        steps: steps in all, those in the journal included.
        journal: gets each step's contributions; an existing one is continued.
        local_steps: how many each client takes in a round.
        combine: see :class:`runtime_driver.fleet.Workers`. None: the mean, with a warning that it trusts every client.
        limit: see :class:`runtime_driver.fleet.Gate`.
        least: a step with fewer contributions that count is not made, and its round ends.
        clients: asked in a round, drawn at random (by ``seed`` and step) from those that are there. None: all.
        deadline: seconds after which a round goes on without the clients that have not reported.
        patience: rounds in a row without a step after which the run gives up.
        dropped: how often each client did not report in time, or only an error.
        errors: the last error that each client reported; the server warns of a client's 1st, 2nd, 4th, 8th, ...
        down_bytes, up_bytes: what the messages of all rounds held, without Flower's framing.
    """

    program: str | Path
    steps: int
    lr: float | Schedule
    journal: str | Path
    eps: float | Schedule | None = None
    seed: int = 0
    local_steps: int = 1
    combine: str | None = None
    limit: float | None = 20.0
    least: int = 1
    clients: int | None = None
    deadline: float | None = 60.0
    patience: int = 10
    dropped: Counter[int] = field(default_factory=Counter)
    errors: dict[int, str] = field(default_factory=dict)
    down_bytes: int = 0
    up_bytes: int = 0

    def __post_init__(self) -> None:
        """Open the program. Raises as :class:`runtime_driver.Session`, and :class:`NoProjectedGradientsError`."""
        self.executor = Executor(LoadedProgram(self.program))
        check_program(self.executor.manifest)
        if self.executor.perturbs != (self.eps is not None):
            raise HyperparameterError("eps", "a number exactly where the program perturbs", self.eps)
        self._rule = self.combine or "mean"
        if self._rule not in RULES:
            raise HyperparameterError("combine", f"one of {sorted(RULES)}", self.combine)
        for name in ("steps", "local_steps", "least", "patience"):
            if getattr(self, name) < 1:
                raise HyperparameterError(name, "a number >= 1", getattr(self, name))
        self._lr = as_schedule(self.lr)
        self._eps = None if self.eps is None else as_schedule(self.eps)
        self._tag = program_tag(self.executor.manifest)
        self.gate = Gate(self._tag, self.executor.manifest.estimator.queries, self.limit)
        self._records: list[Record] = []
        #: How many steps each client is known to have.
        self._known: dict[int, int] = {}
        self._failures = Counter[int]()

    def run(self, grid: Grid) -> None:
        """Train to the last step.

        Warns:
            DriverWarning: no rule was chosen that bears bad clients, nor the mean by name. A client reported an error.

        Raises:
            FleetError: ``patience`` rounds in a row gave no step. Its text has the most frequent error of the clients.
            JournalError: the journal is of another run, or cannot be written.
        """
        if self.combine is None:
            warnings.warn(
                "Contributions are combined by their mean, which trusts every client: one that sends its gradients "
                "times -15 passes all checks, and spoils the run. Say combine='median' or 'trimmed_mean' to bear a "
                "minority of such clients, or combine='mean' if all of them are yours.",
                DriverWarning,
                stacklevel=2,
            )
        path = Path(self.journal)
        with JournalWriter(path) as journal:
            header = self._header()
            if journal.contents is None:
                journal.begin(header)
            else:
                header = journal.contents.header
                self._resume(path, journal)
            idle = number = 0
            while len(self._records) < self.steps:
                before = len(self._records)
                self._round(grid, journal, header, number)
                number += 1
                idle = 0 if len(self._records) > before else idle + 1
                if idle >= self.patience:
                    raise FleetError(self._why_idle(idle))

    def _header(self) -> Header:
        manifest = self.executor.manifest
        return Header(
            program_id=manifest.program_id,
            seed=self.seed,
            steps=self.steps,
            lr=describe(self._lr),
            eps="none" if self._eps is None else describe(self._eps),
            noise=resume.noise_name(manifest),
            queries=manifest.estimator.queries,
            initial_adapter=adapter_sha256(self.executor.initial),
            combine=self._rule,
        )

    def _resume(self, path: Path, journal: JournalWriter) -> None:
        contents, executor = journal.contents, self.executor
        if contents is None:
            return
        resume.check_program(path, contents.header, executor.manifest)
        resume.check_same_run(path, contents, self._header(), self._lr_at, self._eps_at)
        begun = {**executor.initial, **executor.fresh_optimizer()}
        executor.adopt(resume.replay(path, contents, executor.manifest, begun, executor.apply_record))
        self._records = list(contents.records)
        for record in contents.records[-64:]:
            self.gate.learn(record.contributions)

    def _lr_at(self, step: int) -> float:
        return checked("lr", self._lr(step), positive=False)

    def _eps_at(self, step: int) -> float:
        return 0.0 if self._eps is None else checked("eps", self._eps(step), positive=True)

    def _round(self, grid: Grid, journal: JournalWriter, header: Header, number: int) -> None:
        """Ask the clients for the next local steps, and make those that enough of them contributed to."""
        first = len(self._records)
        count = min(self.local_steps, self.steps - first)
        nodes = sorted(grid.get_node_ids())
        if self.clients is not None and len(nodes) > self.clients:
            nodes = sorted(random.Random(f"{self.seed}/{number}").sample(nodes, self.clients))
        if not nodes:
            time.sleep(min(1.0, self.deadline or 1.0))
            return
        messages = [Message(self._task(node, first, count), node, "train", group_id=str(number)) for node in nodes]
        reports: dict[int, list[bytes]] = {}
        for reply in grid.send_and_receive(messages, timeout=self.deadline):
            node = reply.metadata.src_node_id
            if node not in nodes or node in reports:
                continue
            if reply.has_error():
                self._failed(node, reply.error.reason)
            else:
                reports[node] = self._report(node, reply.content)
        self.dropped.update(set(nodes) - set(reports))
        reports = {node: found for node, found in reports.items() if found}
        for place in range(count):
            step = first + place
            seed = step_seed(self.seed, step)
            given = {node: found[place] if place < len(found) else b"" for node, found in reports.items()}
            accepted, refusals = self.gate.check(step, given, lambda node, seed=seed: seed)
            _say(refusals, self.gate)
            if len(accepted) < self.least:
                return
            self.gate.learn(accepted)
            gradients, loss = combined(accepted, self._rule)
            lr, eps = self._lr_at(step), self._eps_at(step)
            record = Record(step, seed, lr, eps, gradients, loss, contributions=accepted)
            state = self.executor.apply_record(self.executor.state, record)
            journal.append(record)
            self.executor.adopt(state)
            self._records.append(record)
            if (step + 1) % 500 == 0:
                resume.write_snapshot(journal.path, header, record, journal.end, state)

    def _task(self, node: int, first: int, count: int) -> RecordDict:
        """What a client is asked to do, with the updates that it has missed."""
        start = self._known.get(node, 0)
        updates = [pack_update(*update) for record in self._records[start:] for update in record.updates]
        self.down_bytes += sum(map(len, updates)) + 8 + 8 + 8 + 8 + 16 * count
        task = ConfigRecord(
            {
                "program": self._tag,
                "seed": self.seed,
                "start": start,
                "updates": updates,
                "hash": bytes.fromhex(adapter_sha256(self.executor.state))[:8],
                "lr": [self._lr_at(first + place) for place in range(count)],
                "eps": [self._eps_at(first + place) for place in range(count)],
            }
        )
        return RecordDict({RECORD: task})

    def _report(self, node: int, content: RecordDict) -> list[bytes]:
        """A client's contributions, one a step; none where it reports a fault or nothing that we know."""
        answer = content.config_records.get(RECORD, ConfigRecord())
        known, found, fault = answer.get("known"), answer.get("contributions", []), answer.get("fault")
        if type(known) is int and 0 <= known <= len(self._records):
            self._known[node] = known
        if fault in _FAULTS:
            self.gate.refused[node] += 1
            _say([Refusal(node, len(self._records), str(fault))], self.gate)
        if not isinstance(found, list) or not all(isinstance(each, bytes) for each in found):
            found = [b""]
        self.up_bytes += sum(map(len, found)) + 8
        return found

    def _failed(self, node: int, reason: str | None) -> None:
        lines = [line.strip() for line in (reason or "").splitlines() if line.strip()] or ["no reason given"]
        # The last line of a traceback says what happened, the first one of other texts.
        self.errors[node] = lines[0][:400] if len(lines) == 1 else f"{lines[0][:200]} ... {lines[-1][-300:]}"
        self._failures[node] += 1
        count = self._failures[node]
        if count & (count - 1) == 0:
            said = f"Client {node} reported an error instead of an answer ({count} so far): {self.errors[node]}"
            warnings.warn(said, DriverWarning, stacklevel=2)

    def _why_idle(self, rounds: int) -> str:
        most = Counter(self.errors.values()).most_common(1)
        said = "".join(f"{count} clients last reported this error: {error} " for error, count in most)
        return (
            f"{rounds} rounds in a row without a step after {len(self._records)} steps: fewer than {self.least} "
            f"clients reported what counts ({self.dropped.total()} answers missing in all, {self._failures.total()} of "
            f"them errors; {self.gate.refused.total()} contributions refused). {said}"
            f"{'Correct that' if said else 'Wait for clients, or raise `deadline`'}; the journal goes on from here."
        )


def server_app(server: Callable[[Context], Server]) -> ServerApp:
    """The app that coordinates; ``server`` makes the run from the context, which has the run's configuration."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server(context).run(grid)

    return app


def _say(refusals: Sequence[Refusal], gate: Gate) -> None:
    for refusal in refusals:
        count = gate.refused[refusal.worker]
        if count & (count - 1) == 0:
            warnings.warn(f"Refused {refusal} ({count} of this worker's so far).", RefusedWarning, stacklevel=2)
