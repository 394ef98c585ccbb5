"""fit, step, apply, replay, resume: the same bits whichever way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime_driver
from runtime_driver import Callback, LinearDecay, Session
from runtime_driver.markup import curve, facts
from tests.driver import tiny
from tests.driver.conftest import Either

RUN: dict[str, Any] = {"lr": 0.5, "eps": 1e-2, "seed": 7}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def test_results_show_themselves_in_a_notebook_and_their_text_is_no_markup(session: Session):
    batches = tiny.make_batches(2)
    run = session.fit(batches, 3, **RUN, eval_batches=batches, label_ids=[0, 1, 2])
    shown = run._repr_html_()
    assert "<th>steps</th><td>3</td>" in shown
    assert f"loss {run.evaluations[0].evaluation.loss:.4f}, accuracy " in shown
    assert shown.count(",") > 3
    assert "<polyline" in shown
    assert "<th>accuracy</th>" not in session.evaluate(batches)._repr_html_()
    assert "projected gradients" in session.step(batches[0], seed=1, lr=0.5, eps=1e-2)._repr_html_()
    assert facts("<i>", [("a&b", "<script>")]) == (
        "<table><caption>&lt;i&gt;</caption><tbody><tr><th>a&amp;b</th><td>&lt;script&gt;</td></tr></tbody></table>"
    )
    assert curve([1.0], "") == ""
    assert curve([float(i) for i in range(1000)], "").count(" ") < 400


def test_fit_learns(session: Session):
    batches = tiny.make_batches(8)
    before = session.evaluate(batches, label_ids=[0, 1, 2])
    result = session.fit(batches, 150, **RUN)
    after = session.evaluate(batches, label_ids=[0, 1, 2])
    assert result.steps == 150
    assert not result.interrupted
    assert len(result.losses) == 150
    assert before.loss == pytest.approx(1.0986, abs=1e-3)
    assert before.loss is not None
    assert after.loss is not None
    assert after.accuracy is not None
    assert after.loss < 0.6 * before.loss
    assert after.accuracy > 0.75
    assert after.examples == 32


def test_two_runs_give_the_same_bits(either: Either):
    sessions = [either.session(), either.session()]
    for one in sessions:
        one.fit(tiny.make_batches(3), 10, **either.run)
    assert same(sessions[0].adapter, sessions[1].adapter)


def test_what_perturbs_nothing_takes_no_epsilon(either: Either, tmp_path: Path):
    session, batches = either.session(), tiny.make_batches(1)
    assert session.perturbs == ("eps" in either.run)
    if session.perturbs:
        return
    for call in (lambda: session.fit(batches, 1, lr=0.5, eps=1e-2), lambda: session.step(batches[0], seed=1, eps=1e-2)):
        with pytest.raises(runtime_driver.HyperparameterError, match="`eps` must be no value for a program of direct"):
            call()
    session.fit(batches, 2, **either.run, journal=tmp_path / "run.jsonl")
    contents = runtime_driver.read_journal(tmp_path / "run.jsonl")
    assert contents.header.eps == "none"
    assert [(each.eps, len(each.projected_gradients), each.state) for each in contents.records] == [(0.0, 2, "")] * 2


def test_run_seed_matters(built_pte: Path):
    sessions = [Session(built_pte), Session(built_pte)]
    for seed, one in enumerate(sessions):
        one.fit(tiny.make_batches(3), 3, lr=0.5, eps=1e-2, seed=seed)
    assert not same(sessions[0].adapter, sessions[1].adapter)


def test_apply_repeats_a_step_without_the_model(either: Either):
    session = either.session()
    out = session.step(tiny.make_batches(1)[0], **{**either.run, "seed": 3, "lr": 0.1}, update=False)
    assert same(session.adapter, session.initial_adapter)
    session.release()
    session.apply(3, 0.1, out.projected_gradients)
    assert same(session.adapter, out.adapter)
    assert session.program.resident_methods() == ("apply",)


def test_only_step_is_resident_while_training(session: Session):
    session.fit(tiny.make_batches(2), 2, **RUN)
    assert session.program.resident_methods() == ("step",)


def test_replay_gives_the_same_bits(either: Either, tmp_path: Path):
    trained, other = either.session(), either.session()
    trained.fit(tiny.make_batches(3), 12, **either.run, journal=tmp_path / "run.jsonl", snapshot_every=None)
    assert other.replay(tmp_path / "run.jsonl") == 12
    assert same(trained.adapter, other.adapter)


def test_replay_of_a_prefix(either: Either, tmp_path: Path):
    trained, other = either.session(), either.session()
    trained.fit(tiny.make_batches(3), 5, **either.run)
    other.fit(tiny.make_batches(3), 9, **either.run, journal=tmp_path / "run.jsonl", snapshot_every=4)
    other.replay(tmp_path / "run.jsonl", 5)
    assert same(trained.adapter, other.adapter)
    with pytest.raises(runtime_driver.JournalError, match=r"has 9 steps, 10 were asked for"):
        other.replay(tmp_path / "run.jsonl", 10)


@pytest.mark.parametrize("snapshot_every", [None, 1, 3])
def test_resume_equals_an_uninterrupted_run(either: Either, tmp_path: Path, snapshot_every: int | None):
    whole = either.session()
    whole.fit(tiny.make_batches(3), 11, **either.run, journal=tmp_path / "whole.jsonl", snapshot_every=None)
    for steps in (4, 11):
        part = either.session()
        result = part.fit(
            tiny.make_batches(3), steps, **either.run, journal=tmp_path / "part.jsonl", snapshot_every=snapshot_every
        )
    assert result.first_step == 4
    assert len(result.losses) == 11
    assert same(whole.adapter, part.adapter)
    # The checksums differ, as they go on from the headers', which differ in `steps`.
    first, second = (runtime_driver.read_journal(tmp_path / name) for name in ("whole.jsonl", "part.jsonl"))
    assert first.records == second.records


def test_the_same_session_goes_on_with_its_journal(session: Session, built_pte: Path, tmp_path: Path):
    whole = Session(built_pte)
    whole.fit(tiny.make_batches(3), 6, **RUN)
    for steps in (2, 4, 6):
        session.fit(tiny.make_batches(3), steps, **RUN, journal=tmp_path / "run.jsonl")
    assert same(whole.adapter, session.adapter)


def test_a_damaged_snapshot_only_costs_time(built_pte: Path, tmp_path: Path):
    first, second = Session(built_pte), Session(built_pte)
    first.fit(tiny.make_batches(3), 6, **RUN, journal=tmp_path / "run.jsonl", snapshot_every=2)
    snapshot = tmp_path / "run.jsonl.snapshot.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="Snapshot ignored"):
        second.replay(tmp_path / "run.jsonl")
    assert same(first.adapter, second.adapter)


def test_a_run_from_another_adapter_keeps_it_beside_the_journal(built_pte: Path, tmp_path: Path):
    warm = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), 0.25)}
    whole, first, second, third = (Session(built_pte) for _ in range(4))
    whole.adapter = first.adapter = warm
    whole.fit(tiny.make_batches(2), 5, **RUN)
    first.fit(tiny.make_batches(2), 3, **RUN, journal=tmp_path / "run.jsonl")
    # Fresh sessions know the warm adapter only from the file beside the journal.
    second.fit(tiny.make_batches(2), 5, **RUN, journal=tmp_path / "run.jsonl")
    third.replay(tmp_path / "run.jsonl")
    assert same(whole.adapter, second.adapter)
    assert same(whole.adapter, third.adapter)


def test_an_unrelated_adapter_is_not_overwritten_by_a_resume(session: Session, tmp_path: Path):
    session.fit(tiny.make_batches(2), 3, **RUN, journal=tmp_path / "run.jsonl")
    session.adapter = {tiny.FQN_B: torch.ones(tiny.CLASSES, tiny.RANK)}
    with pytest.raises(runtime_driver.JournalMismatchError, match="initial_adapter"):
        session.fit(tiny.make_batches(2), 5, **RUN, journal=tmp_path / "run.jsonl")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"seed": 8}, "seed"), ({"lr": 0.25}, "lr of step 0"), ({"eps": 0.5}, "eps of step 0"), ({"steps": 2}, "steps")],
)
def test_resume_refuses_other_settings(session: Session, tmp_path: Path, change: dict, field: str):
    journal = tmp_path / "run.jsonl"
    session.fit(tiny.make_batches(2), 3, **RUN, journal=journal)
    before = journal.read_bytes()
    with pytest.raises(runtime_driver.JournalMismatchError) as caught:
        session.fit(tiny.make_batches(2), **{"steps": 5, **RUN, **change}, journal=journal)
    assert caught.value.field == field
    assert journal.read_bytes() == before


def test_schedule_values_reach_the_journal(session: Session, tmp_path: Path):
    session.fit(tiny.make_batches(2), 5, lr=LinearDecay(1.0, 5), eps=0.01, journal=tmp_path / "run.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()[1:]]
    assert [line["lr"] for line in lines] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [line["seed"] for line in lines] == [runtime_driver.step_seed(0, step) for step in range(5)]


def test_step_seeds_do_not_repeat_and_do_not_change():
    assert len({runtime_driver.step_seed(5, step) for step in range(50_000)}) == 50_000
    assert all(0 <= runtime_driver.step_seed(2**62, step) < 2**31 for step in range(100))
    # These values are in people's journals: a change here would break every resume.
    assert [runtime_driver.step_seed(0, step) for step in range(3)] == [1130986368, 1955794397, 1250184950]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stops_at_the_last_good_step(built_pte: Path, tmp_path: Path, bad: float):
    batches = tiny.make_batches(5)
    batches[3]["x"] = torch.full_like(batches[3]["x"], bad)
    good, stopped = Session(built_pte), Session(built_pte)
    good.fit(batches, 3, **RUN)
    with pytest.raises(runtime_driver.NonFiniteLossError, match=r"Step 3 .* not all finite") as caught:
        stopped.fit(batches, 5, **RUN, journal=tmp_path / "run.jsonl")
    assert caught.value.step == 3
    assert same(good.adapter, stopped.adapter)
    assert len(runtime_driver.read_journal(tmp_path / "run.jsonl").records) == 3


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"lr": float("nan")}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": 1e39}, "lr"),
        ({"eps": 0.0}, "eps"),
        ({"eps": 1e-60}, "eps"),
        ({"seed": -1}, "seed"),
        ({"steps": -1}, "steps"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"fsync": "always"}, "fsync"),
    ],
)
def test_settings_out_of_range(session: Session, tmp_path: Path, arguments: dict, name: str):
    with pytest.raises(runtime_driver.HyperparameterError) as caught:
        session.fit(tiny.make_batches(1), **{"steps": 1, **RUN, **arguments}, journal=tmp_path / "run.jsonl")
    assert caught.value.name == name
    assert list(tmp_path.iterdir()) == []


class Recorder(Callback):
    def __init__(self):
        self.events: list[str] = []

    def on_start(self, start):
        self.events.append(f"start {start.first_step}/{start.steps}")

    def on_step(self, record):
        self.events.append(f"step {record.step}")

    def on_evaluate(self, record):
        self.events.append(f"evaluate {record.step} {record.evaluation.examples}")

    def on_end(self, result):
        self.events.append(f"end {result.steps if result else None}")


def test_callbacks(session: Session):
    recorder = Recorder()
    result = session.fit(
        tiny.make_batches(2), 3, **RUN, callbacks=[recorder], eval_batches=tiny.make_batches(2), eval_every=2
    )
    assert recorder.events == [
        "start 0/3",
        "step 0",
        "step 1",
        "evaluate 2 8",
        "step 2",
        "evaluate 3 8",
        "end 3",
    ]
    assert [record.step for record in result.evaluations] == [2, 3]


def test_on_end_is_told_of_an_error(session: Session):
    recorder = Recorder()
    with pytest.raises(runtime_driver.DataExhaustedError, match="before step 2 of 5"):
        session.fit(iter(tiny.make_batches(2)), 5, **RUN, callbacks=[recorder])
    assert recorder.events[-1] == "end None"


def test_progress_bar_reports(session: Session, capfd: pytest.CaptureFixture[str]):
    session.fit(tiny.make_batches(2), 3, **RUN, progress=True)
    text = capfd.readouterr().err
    assert "3/3" in text
    assert "examples/s" in text
    assert "MiB" in text
