"""Federated clients with Flower's own messages, apps and contexts; only the network is left out."""

# pyright: reportMissingImports=false, reportUnnecessaryTypeIgnoreComment=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAbstractUsage=false, reportAssignmentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'mobizo[fleet]' installs it")

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import runtime_driver as driver
from runtime_driver import Session, read_journal
from runtime_driver.fleet import Privacy
from runtime_driver.fleet.flower import RECORD, Server, client_app, server_app
from runtime_driver.fleet.messages import Message as Report
from tests.driver import tiny
from tests.driver.conftest import Either

NODES = 5


class Network(Grid):
    """Clients in this process; each message goes through Flower's wire format, and is kept."""

    def __init__(self, either: Either, nodes: int = NODES, **options: Any) -> None:
        self.app = client_app(either.path, self.batches, **options)
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config={"part": node}, state=RecordDict(), run_config={})
            for node in range(100, 100 + nodes)
        }
        self.seen: list[RecordDict] = []
        self.away: Callable[[int], bool] = lambda node: False
        self.change: Callable[[int, RecordDict], RecordDict] = lambda node, content: content

    def batches(self, context: Context) -> list[dict[str, torch.Tensor]]:
        """Each client's own, and mostly of one class."""
        rows = [batch for batch in tiny.make_batches(40) if (batch["label"] == int(context.node_id) % 3).sum() > 1]
        return rows[int(context.node_id) % 2 :: 2]

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._reply(each) for each in messages if not self.away(each.metadata.dst_node_id)]

    def _reply(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        message.content = self._travel(message.content)
        reply = self.app(message, self.contexts[node])
        if reply.has_error():
            return reply
        reply.content = self._travel(self.change(node, reply.content))
        return reply

    def _travel(self, content: RecordDict) -> RecordDict:
        self.seen.append(recorddict_from_proto(recorddict_to_proto(content)))
        return self.seen[-1]

    def _unused(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    set_run = create_message = push_messages = pull_messages = run = _unused


Network.__abstractmethods__ = frozenset()


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch):
    """Flower's process of a ServerApp knows which run it is."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def server(either: Either, tmp_path: Path, steps: int, **options: Any) -> Server:
    fixed = {**either.run, "lr": 0.2, "combine": "mean", **options}
    return Server(either.path, steps, journal=tmp_path / "run.jsonl", **fixed)


def replayed(either: Either, tmp_path: Path) -> Session:
    session = either.session()
    session.replay(tmp_path / "run.jsonl")
    return session


def accuracy(session: Session) -> float:
    return session.evaluate(tiny.make_batches(10, seed=3), label_ids=[0, 1, 2]).accuracy or 0.0


def adapter_at(network: Network, node: int) -> torch.Tensor:
    return network.contexts[node].state["mobizo-state"].to_torch_state_dict()[tiny.FQN_B]


def test_twenty_clients_a_third_of_them_away(either: Either, tmp_path: Path):
    network, chance, single = Network(either, 20), random.Random(0), either.session()
    network.away = lambda node: chance.random() < 0.3
    run = server(either, tmp_path, 60, local_steps=3)
    server_app(lambda context: run)(network, Context(1, 1, {}, RecordDict(), {}))
    session = replayed(either, tmp_path)
    single.fit(tiny.make_batches(40), 60, **{**either.run, "lr": 0.2})
    assert accuracy(session) > accuracy(single) - 0.1
    assert accuracy(session) > 0.7
    assert sum(run.dropped.values()) > 75
    assert not run.gate.refused
    # Whoever was away catches up without a forward pass, to the bits of the journal.
    network.away = lambda node: False
    last = server(either, tmp_path, 61)
    last.run(network)
    before = either.session()
    before.replay(tmp_path / "run.jsonl", 60)
    assert all(torch.equal(adapter_at(network, node), before.adapter[tiny.FQN_B]) for node in network.contexts)


def test_local_steps_average_the_clients_adapters(either: Either, tmp_path: Path):
    """Three local steps of each, combined step by step, are the mean of the adapters: what FedAvg would send."""
    network = Network(either, examples=lambda context: context.node_id % 4 + 1)
    run = server(either, tmp_path, 3, local_steps=3)
    run.run(network)
    adapters, weights = [], []
    for node, context in network.contexts.items():
        session = either.session()
        session.fit(network.batches(context), 3, **{**either.run, "lr": 0.2})
        adapters.append(session.adapter[tiny.FQN_B])
        weights.append(node % 4 + 1)
    mean = sum(a * w for a, w in zip(adapters, weights, strict=True)) / sum(weights)
    # float32 sums of three updates of size 1.
    assert torch.allclose(replayed(either, tmp_path).adapter[tiny.FQN_B], mean, atol=1e-6)


def test_nothing_but_seeds_scalars_and_hashes_travels(either: Either, tmp_path: Path):
    network = Network(either)
    run = server(either, tmp_path, 4, local_steps=2)
    run.run(network)
    size = 28 + 4 * tiny.QUERIES
    assert len(network.seen) == 2 * 2 * NODES
    for content in network.seen:
        assert list(content) == [RECORD]
        record = content[RECORD]
        assert isinstance(record, ConfigRecord)
        if "contributions" in record:
            assert set(record) == {"contributions", "known"}
            assert [len(each) for each in record["contributions"]] == [size, size]
            assert all(Report.unpack(each).program == run._tag for each in record["contributions"])
        else:
            assert set(record) == {"program", "seed", "start", "updates", "hash", "lr", "eps"}
            assert all(len(each) == 8 + 4 * tiny.QUERIES for each in record["updates"])
            assert len(record["hash"]) == len(record["program"]) == 8
            assert {type(each) for name in ("lr", "eps") for each in record[name]} == {float}
    assert run.up_bytes == 2 * NODES * (2 * size + 8)


def test_a_run_goes_on_from_its_journal_with_other_clients(either: Either, tmp_path: Path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for directory in (whole, part):
        directory.mkdir()
    server(either, whole, 6).run(Network(either))
    server(either, part, 4).run(Network(either))
    server(either, part, 6).run(Network(either))
    assert read_journal(whole / "run.jsonl").records == read_journal(part / "run.jsonl").records


def changed(node: int, **fields: Any) -> Callable[[int, RecordDict], RecordDict]:
    def change(sender: int, content: RecordDict) -> RecordDict:
        if sender == node:
            content[RECORD] = ConfigRecord({**content[RECORD], **fields})
        return content

    return change


@pytest.mark.parametrize("kind", ["NaN", "text", "too few", "another adapter"])
def test_a_bad_client_is_refused_and_the_others_go_on(either: Either, tmp_path: Path, kind: str):
    network, bad = Network(either), 102
    report = Report(b"x" * 8, 0, 0, 1.0, math.nan, (math.nan, 0.0))
    network.change = {
        "NaN": changed(bad, contributions=[report.pack()]),
        "text": changed(bad, contributions="weights"),
        "too few": changed(bad, contributions=[b"abc"]),
        "another adapter": changed(bad, contributions=[], fault="another adapter", known=0),
    }[kind]
    run = server(either, tmp_path, 5)
    with pytest.warns(driver.RefusedWarning, match="worker 102"):
        run.run(network)
    assert run.gate.refused == {102: 5}
    assert all(len(record.contributions) == NODES - 1 for record in read_journal(run.journal).records)


def test_clients_that_lost_or_changed_their_state_start_over(either: Either, tmp_path: Path):
    network = Network(either, 2)
    server(either, tmp_path, 2).run(network)
    run = server(either, tmp_path, 5)
    run._known = {100: 2, 101: 1}
    network.contexts[100].state.pop("mobizo-state")
    state = network.contexts[101].state
    state["mobizo-state"] = type(state["mobizo-state"])({tiny.FQN_B: adapter_at(network, 101) + 1})
    with pytest.warns(driver.RefusedWarning, match="worker 101, step 2: another adapter"):
        run.run(network)
    assert run.gate.refused == {101: 1}
    assert [len(record.contributions) for record in read_journal(run.journal).records] == [2] * 5


def test_without_clients_the_run_gives_up_and_says_so(either: Either, tmp_path: Path):
    network = Network(either, 2)
    network.away = lambda node: True
    with pytest.raises(driver.FleetError, match="3 rounds in a row without a step after 0 steps"):
        server(either, tmp_path, 5, patience=3).run(network)


def test_the_errors_that_clients_report_are_said(either: Either, tmp_path: Path):
    """Flower's simulation reports so what an app raises, and for the rest of a run a process that died."""
    network, broken = Network(either, 3), {100}
    app, reason = network.app, f"Traceback:\n{'  File ...' * 100}\nOSError: no disk"

    def failing(message: Message, context: Context) -> Message:
        bad = context.node_id in broken
        return Message(Error(1, reason), reply_to=message) if bad else app(message, context)

    network.app = failing
    run = server(either, tmp_path, 3)
    with pytest.warns(driver.DriverWarning, match="^Client 100 .* Traceback: .* OSError: no disk$") as caught:
        run.run(network)
    assert len(caught) == 2  # at the 1st and 2nd of three
    assert run.dropped == {100: 3}
    broken |= {101, 102}
    with (
        pytest.warns(driver.DriverWarning),
        pytest.raises(driver.FleetError, match=r"after 3 steps.* 3 clients last reported this error: .*no disk"),
    ):
        server(either, tmp_path, 5, patience=2).run(network)


def test_an_app_can_be_sent_to_the_process_of_a_client(either: Either, tmp_path: Path):
    """Flower's simulation pickles the app for each message, after it was used, too. Nobody chose the mean here."""
    network = Network(either, 2)
    with pytest.warns(driver.DriverWarning, match="mean, which trusts every client"):
        server(either, tmp_path, 1, combine=None).run(network)
    network.app = cloudpickle.loads(cloudpickle.dumps(network.app))
    server(either, tmp_path, 2).run(network)
    assert [len(record.contributions) for record in read_journal(tmp_path / "run.jsonl").records] == [2, 2]


def test_privacy_bounds_what_leaves(either: Either, tmp_path: Path):
    network = Network(either, 3, privacy=Privacy(clip=0.01, noise=0.0))
    server(either, tmp_path, 2).run(network)
    for record in read_journal(tmp_path / "run.jsonl").records:
        assert record.loss == 0.0
        assert all(part.weight == 1.0 for part in record.contributions)
        # The bound, and float32's rounding of two numbers.
        assert all(math.hypot(*part.projected_gradients) <= 0.01 * (1 + 1e-6) for part in record.contributions)
    noisy = [Privacy(clip=1.0, noise=2.0)([0.0])[0] for _ in range(400)]
    # The deviation of 400 draws is off by more than 20 % once in ten million runs.
    assert math.sqrt(sum(value * value for value in noisy) / 400) == pytest.approx(2.0, rel=0.2)
    with pytest.raises(driver.HyperparameterError):
        Privacy(clip=0.0, noise=1.0)
