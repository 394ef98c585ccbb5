"""Records of several workers: what they combine to, and the way through a journal and back."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime_driver import JournalCorruptError, Session, read_journal, step_seed
from runtime_driver.adapter_io import adapter_sha256
from runtime_driver.format.contributions import RULES, Contribution, combined
from runtime_driver.format.numbers import as_float32
from runtime_driver.format.records import Header, Record, checksum, decode_record, encode_record
from runtime_driver.format.seeds import worker_seed
from runtime_driver.journal import JournalWriter
from tests.driver import tiny
from tests.driver.conftest import Either

numbers = st.floats(-1e6, 1e6, width=32)
contributions = st.lists(
    st.tuples(st.floats(1, 1e3, width=32), st.tuples(numbers, numbers), numbers), min_size=1, max_size=12
).map(lambda found: tuple(Contribution(i, 5, *each) for i, each in enumerate(found)))


def record_of(step: int, parts: tuple[Contribution, ...], rule: str, lr: float = 0.5) -> Record:
    return Record(step, step_seed(7, step), lr, 0.0, *combined(parts, rule), contributions=parts)


@given(contributions, st.sampled_from(list(RULES)))
def test_records_come_back_with_the_same_bits(parts: tuple[Contribution, ...], rule: str):
    record = record_of(3, parts, rule)
    again = decode_record(encode_record(record), 2, 0, rule)
    assert again == record
    assert again.updates == ((5, 0.5, record.projected_gradients),)


@given(contributions)
def test_rules(parts: tuple[Contribution, ...]):
    first, weights = [each.projected_gradients[0] for each in parts], [each.weight for each in parts]
    assert combined(parts, "median")[0][0] == as_float32(statistics.median(first))
    # float64 sums of at most twelve products, rounded to float32: exact to 1e-6 of what is summed.
    bound = 1e-6 * max(map(abs, first))
    mean = sum(value * weight for value, weight in zip(first, weights, strict=True)) / sum(weights)
    assert combined(parts, "mean")[0][0] == pytest.approx(mean, abs=bound)
    low, high = (min(first), max(first)) if len(first) < 3 else (sorted(first)[1], sorted(first)[-2])
    assert low - bound <= combined(parts, "trimmed_mean")[0][0] <= high + bound


def test_seeds_of_workers_do_not_repeat():
    seeds = {worker_seed(7, step, worker) for step in range(500) for worker in range(128)}
    assert len(seeds) == 500 * 128
    assert worker_seed(7, 41, 0) == step_seed(7, 41)


@pytest.fixture
def journal(either: Either, tmp_path: Path) -> Path:
    """Two steps along one noise, and one of two workers along noises of their own."""
    session, path = either.session(), tmp_path / "run.jsonl"
    with JournalWriter(path) as writer:
        manifest = session.manifest
        sha256 = adapter_sha256(session.adapter)
        writer.begin(Header(manifest.program_id, 7, 3, "", "", "gaussian/1", 2, sha256, combine="mean"))
        for step in range(3):
            seeds = [step_seed(7, step)] * 2 if step < 2 else [worker_seed(7, step, worker) for worker in (0, 1)]
            parts = (Contribution(0, seeds[0], 1.0, (0.5, -1.0), 1.5), Contribution(1, seeds[1], 3.0, (1.0, 2.0), 0.5))
            writer.append(record_of(step, parts, "mean"))
    return path


def test_replay_applies_what_the_contributions_combine_to(either: Either, journal: Path):
    by_hand, replayed = either.session(), either.session()
    for step in range(2):
        by_hand.apply(step_seed(7, step), 0.5, (0.875, 1.25))
    by_hand.apply(worker_seed(7, 2, 0), 0.125, (0.5, -1.0))
    by_hand.apply(worker_seed(7, 2, 1), 0.375, (1.0, 2.0))
    assert replayed.replay(journal) == 3
    assert torch.equal(replayed.adapter[tiny.FQN_B], by_hand.adapter[tiny.FQN_B])
    assert [record.loss for record in read_journal(journal).records] == [0.75] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 1 is not that of worker 1"),
        ({"weight": 0.0}, "expected weights above 0"),
        ({"worker": 0}, "in the order of their workers"),
        ({"projected_gradients": (1.0,)}, "expected 2 projected gradients"),
        ({"loss": 0.75}, "combine to the loss 0.75, found 0.9375"),
    ],
)
def test_a_contribution_that_cannot_be(either: Either, journal: Path, changes: dict, message: str):
    record = read_journal(journal).records[0]
    first, second = record.contributions
    lines = journal.read_bytes().splitlines(keepends=True)
    changed = replace(record, contributions=(first, replace(second, **changes)))
    journal.write_bytes(lines[0] + encode_record(changed, checksum(lines[0])))
    with pytest.raises(JournalCorruptError, match=message):
        either.session().replay(journal)


def test_a_run_of_one_process_is_written_as_before(built_pte: Path, tmp_path: Path):
    Session(built_pte).fit(tiny.make_batches(1), 1, lr=0.5, eps=1e-2, journal=tmp_path / "run.jsonl")
    header, record = (tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    assert b'"version":2,' in header
    assert b"combine" not in header
    assert b"contributions" not in record
