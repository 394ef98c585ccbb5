"""Several workers in one run: equal to the bit, equal to one process with all their data, and robust to a bad one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import runtime_driver as driver
from runtime_driver import Session, read_journal
from runtime_driver.executor import clones
from runtime_driver.fleet import Gate, Shard, Workers
from runtime_driver.fleet.messages import Message
from runtime_driver.format.contributions import Contribution
from tests.driver import threads, tiny
from tests.driver.conftest import Either

WORKERS = 4


def warmed(either: Either, count: int = WORKERS) -> list[Session]:
    """Sessions whose methods are loaded: loading redirects stderr, which threads share."""
    sessions = [either.session() for _ in range(count)]
    for session in sessions:
        out = session.step(tiny.make_batches(1)[0], **either.run, update=False)
        session.apply(1, 0.0, out.projected_gradients)
    return sessions


def equal(sessions: list[Session]) -> bool:
    return all(torch.equal(each.adapter[tiny.FQN_B], sessions[0].adapter[tiny.FQN_B]) for each in sessions)


def shards(rank: int) -> Shard:
    return Shard(tiny.make_batches(12), rank, WORKERS)


@pytest.fixture(scope="module")
def concatenated(either: Either, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """The same program, compiled for the batches of all workers at once."""
    build = tiny.build if "eps" in either.run else tiny.build_derivatives
    path = tmp_path_factory.mktemp("large") / "large.pte"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SIZE", WORKERS * tiny.SIZE)
        return Session(build(path))


def test_four_workers_are_one_process_with_the_concatenated_batch(
    either: Either, concatenated: Session, tmp_path: Path
):
    path, sessions = tmp_path / "run.jsonl", warmed(either)
    for _, workers in threads.fit(sessions, shards, 200, **either.run, journal=path):
        assert workers.step_bytes == 3 * (28 + 4 * tiny.QUERIES) <= 200
    assert equal(sessions)
    replayed = either.session()
    assert replayed.replay(path) == 200
    assert equal([*sessions, replayed])
    adapter = either.session()
    for record in read_journal(path).records:
        batches = [shards(rank).batch(record.step) for rank in range(WORKERS)]
        concatenated.adapter = adapter.adapter
        batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}
        run = {"lr": record.lr, "seed": record.seed, **({"eps": record.eps} if "eps" in either.run else {})}
        whole = concatenated.step(batch, **run, update=False)
        # Losses of size 1 are off by some 1e-7; differences of them are divided by 2 eps = 0.02.
        off = 4e-5 if "eps" in either.run else 2e-6
        assert record.projected_gradients == pytest.approx(whole.projected_gradients, abs=off)
        assert record.loss == pytest.approx(whole.loss, abs=1e-6)
        (update,) = record.updates
        adapter.apply(*update)


class Counted(list):
    """A data set of batches that counts how often one is read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


def loader(data: Any) -> DataLoader:
    return DataLoader(data, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["shuffled", "generator"])
def test_shards_read_what_has_no_random_access_once(kind: str):
    """Together the workers see each batch once an epoch, and one that resumes sees what it would have seen."""
    data = [Counted({"x": torch.tensor(number)} for number in range(12)) for _ in range(3)]

    def shard(own: Counted, rank: int, size: int = 2) -> Shard:
        return Shard(loader(own) if kind == "shuffled" else (own[number] for number in range(12)), rank, size)

    first, second = ([int(each.batch(step)["x"]) for step in range(6)] for each in map(shard, data, range(2)))
    assert sorted(first + second) == list(range(12))
    assert (first + second == sorted(first + second)) is False
    assert data[0].read <= 12
    resumed = shard(data[2], 1)
    assert [int(resumed.batch(step)["x"]) for step in (3, 4, 5)] == second[3:]
    if kind == "shuffled":
        assert {int(resumed.batch(step)["x"]) for step in range(6, 12)} != set(second)  # another epoch
        resumed.batch(0)
    else:
        with pytest.raises(driver.DataExhaustedError, match="before step 6\\. "):
            resumed.batch(6)
        with pytest.raises(driver.BatchError, match="batch 1 is asked for again, and generator gives each batch once"):
            resumed.batch(0)


@pytest.mark.parametrize("mode", ["data", "queries"])
def test_one_that_joins_late_replays_and_takes_part(either: Either, tmp_path: Path, mode: str):
    path, own = tmp_path / "run.jsonl", {**either.run, "journal": tmp_path / "run.jsonl", "mode": mode}
    batches: Callable[[int], Any] = shards if mode == "data" else lambda rank: tiny.make_batches(3)
    threads.fit(warmed(either, 2), batches, 5, **own)
    sessions = warmed(either, 3)
    for session in sessions:
        session.adapter = session.initial_adapter
    ended = threads.fit(sessions, batches, 9, **own)
    assert [result.first_step for result, _ in ended] == [5, 5, 5]
    replayed = either.session()
    replayed.replay(path)
    assert equal([*sessions, replayed])
    records = read_journal(path).records
    assert [len(record.contributions) for record in records] == [2] * 5 + [3] * 4
    assert {len(record.updates) for record in records[5:]} == {1 if mode == "data" else 3}


NAN, THOUSAND = "NaN", "x-1000"


def times(factor: float) -> Callable[[Message], Message]:
    return lambda m: replace(m, projected_gradients=tuple(factor * g for g in m.projected_gradients))


POISON: dict[str, Callable[[Message], Message]] = {
    NAN: lambda m: replace(m, projected_gradients=(math.nan, 1.0)),
    THOUSAND: times(-1000),
    "another program": lambda m: replace(m, program=bytes(8)),
    "another step": lambda m: replace(m, step=m.step + 1),
    "another seed": lambda m: replace(m, seed=1),
    "infinite weight": lambda m: replace(m, weight=math.inf),
    "heavy": lambda m: replace(m, weight=1e9),
}


@pytest.mark.parametrize("kind", POISON)
def test_one_bad_worker_in_ten_is_named_and_spoils_nothing(either: Either, kind: str):
    def accuracy(hub: threads.Hub) -> tuple[float, list[Any]]:
        sessions = warmed(either, 10)
        ended = threads.fit(sessions, lambda r: Shard(tiny.make_batches(30), r, 10), 40, hub, **either.run)
        assert equal(sessions)
        return sessions[0].evaluate(tiny.make_batches(8), label_ids=[0, 1, 2]).accuracy or 0.0, ended

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, ended = accuracy(threads.Hub(10, threads.poison(7, POISON[kind])))
    (counts,) = {tuple(workers.refused.items()) for _, workers in ended}
    # Near the minimum, a thousand times a batch's own gradient is at times of the size of the others'.
    assert counts == ((7, 40),) or (kind == THOUSAND and counts[0][0] == 7 and counts[0][1] > 30)
    mine = [str(each.message) for each in said if each.category is driver.RefusedWarning]
    assert {text.split(",")[0] for text in mine} == {"Refused worker 7"}
    # Said at refusals 1, 2, 4, 8, 16 (and 32), by worker 0 and by worker 7.
    assert len(mine) in (10, 12)
    assert found > 0.75


@pytest.mark.parametrize(("rule", "bears"), [("mean", False), ("median", True), ("trimmed_mean", True)])
def test_robust_rules_bear_what_no_check_finds(either: Either, rule: str, bears: bool):
    """One of ten goes the wrong way, but not by an absurd size."""
    sessions, hub = warmed(either, 10), threads.Hub(10, threads.poison(7, times(-15)))
    run = {**either.run, "combine": rule}
    ended = threads.fit(sessions, lambda r: Shard(tiny.make_batches(30), r, 10), 60, hub, **run)
    assert not ended[0][1].refused
    accuracy = sessions[0].evaluate(tiny.make_batches(8), label_ids=[0, 1, 2]).accuracy or 0.0
    assert accuracy > 0.75 if bears else accuracy < 0.6


def test_a_worker_whose_adapter_differs_is_named_and_stopped(either: Either):
    class Flipping(Shard):
        """Changes the adapter of the worker that reads it."""

        def batch(self, step: int):
            if step == 2:
                sessions[1].adapter = {fqn: -tensor for fqn, tensor in sessions[1].adapter.items()}
            return super().batch(step)

    sessions = warmed(either, 3)
    ended = threads.fit(
        sessions,
        lambda rank: (Flipping if rank == 1 else Shard)(tiny.make_batches(12), rank, 3),
        9,
        **either.run,
        hash_every=4,
    )
    assert all(isinstance(error, driver.AdapterDivergedError) for error, _ in ended)
    assert {(error.step, error.workers) for error, _ in ended} == {(4, (1,))}
    assert "(that is this worker)" in str(ended[1][0])


def test_a_worker_that_is_asked_to_stop_stops_all_after_the_same_step(either: Either):
    sessions, hub = warmed(either, 3), threads.Hub(3, threads.poison(1, lambda m: replace(m, stop=m.step == 3)))
    ended = threads.fit(sessions, shards, 9, hub, **either.run)
    assert {(result.steps, result.interrupted) for result, _ in ended} == {(4, True)}
    assert equal(sessions)


def test_workers_of_different_runs_do_not_mix(either: Either):
    sessions = warmed(either, 2)
    sessions[1].manifest = sessions[1]._executor.manifest = sessions[1].manifest.model_copy(
        update={"program_id": "other"}
    )
    ended = threads.fit(sessions, shards, 3, **either.run)
    assert all(isinstance(error, driver.WorkerMismatchError) for error, _ in ended)
    assert ended[0][0].worker == 1
    assert ended[0][0].field == "program_id"


def test_when_nothing_counts_the_run_stops(either: Either, tmp_path: Path):
    sessions = warmed(either, 2)
    before = clones(sessions[0].adapter)
    bad = [{**each, "x": torch.full_like(each["x"], math.nan)} for each in tiny.make_batches(1)]
    with pytest.warns(driver.RefusedWarning):
        ended = threads.fit(sessions, lambda rank: bad, 3, **either.run, journal=tmp_path / "run.jsonl")
    assert all(isinstance(error, driver.AllRefusedError) for error, _ in ended)
    assert torch.equal(sessions[0].adapter[tiny.FQN_B], before[tiny.FQN_B])


def test_the_gate_knows_what_is_usual_from_the_journal():
    """Of two workers none is in the majority; the steps before tell which one is off."""
    gate, part = Gate(b"program.", 1), Contribution(0, 5, 1.0, (1.0,), 1.0)
    for _ in range(3):
        gate.learn([part])

    def refused(gate: Gate, *found: bytes) -> list[str]:
        return [str(each) for each in gate.check(4, dict(enumerate(found)), lambda worker: 5)[1]]

    good, large, wide = (
        Message.of(b"program.", 4, replace(part, projected_gradients=values)).pack()
        for values in ((1.0,), (-21.0,), (1.0, 2.0))
    )
    assert refused(gate, good, large) == ["worker 1, step 4: a projected gradient of 21, 21 times the usual"]
    assert not refused(gate, large)
    assert not refused(Gate(b"program.", 1, limit=None), good, large)
    assert refused(gate, b"abc", good) == ["worker 0, step 4: not a contribution: 3 bytes, expected at least 28"]
    assert len(refused(gate, good[:-1], good)) == 1
    assert refused(gate, wide) == ["worker 0, step 4: 2 projected gradients, expected 1"]


@pytest.mark.parametrize(
    ("options", "name"),
    [({"mode": "rows"}, "mode"), ({"combine": "max"}, "combine"), ({"hash_every": 0}, "hash_every")],
)
def test_arguments_out_of_range(options: dict, name: str):
    with pytest.raises(driver.HyperparameterError) as caught:
        Workers(**options, channel=threads.ThreadChannel(threads.Hub(1), 0))
    assert caught.value.name == name


def test_queries_are_not_combined_robustly():
    with pytest.raises(driver.HyperparameterError, match="'mean'"):
        Workers("queries", "median", channel=threads.ThreadChannel(threads.Hub(1), 0))


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(driver.FleetError, match="torchrun --nproc-per-node"):
        Workers()
