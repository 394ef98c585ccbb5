"""NaN and infinity stop a run, and the last adapter that had a finite loss is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime_driver
from runtime_driver import NonFiniteAdapterError, NonFiniteLossError, Session
from tests.driver import tiny
from tests.driver.test_training import same

RUN: dict[str, Any] = {"eps": 1e-2, "seed": 1}
OVERFLOW = 3e38
#: Leads from a good adapter to one that is finite and whose loss is not.
TOO_LARGE = 6e37


class Jump:
    """A learning rate that is far too large at one step."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def __call__(self, step: int) -> float:
        return self.value if step == self.step else 0.5


def after(pte: Path, steps: int) -> dict[str, torch.Tensor]:
    session = Session(pte)
    session.fit(tiny.make_batches(3), steps, lr=0.5, **RUN)
    return session.adapter


def test_an_update_that_overflows_is_not_made(built_pte: Path, tmp_path: Path):
    session, journal = Session(built_pte), tmp_path / "run.jsonl"
    with pytest.raises(NonFiniteAdapterError, match=rf"step 2 .* of 6 values of `{tiny.FQN_B}` are NaN") as caught:
        session.fit(tiny.make_batches(3), 5, lr=Jump(2, OVERFLOW), **RUN, journal=journal)
    assert 0 < caught.value.count <= 6
    assert same(session.adapter, after(built_pte, 2))
    # The loss at step 2 was finite, so the adapter before the update is good.
    assert caught.value.good_steps == 2
    assert caught.value.last_good is not None
    assert same(caught.value.last_good, session.adapter)
    assert len(runtime_driver.read_journal(journal).records) == 2


def test_neither_a_step_nor_an_apply_that_overflows_is_adopted(session: Session):
    before = session.adapter
    with pytest.raises(NonFiniteAdapterError, match="The update gives"):
        session.step(tiny.make_batches(1)[0], runtime_driver.step_seed(1, 0), OVERFLOW, 1e-2)
    with pytest.raises(NonFiniteAdapterError, match="The update gives"):
        session.apply(3, OVERFLOW, [20.0, -20.0])
    assert same(session.adapter, before)


@pytest.mark.parametrize("resumed", [False, True])
def test_the_last_good_adapter_is_the_one_before_the_update_that_led_to_nan(
    built_pte: Path, tmp_path: Path, resumed: bool
):
    session, journal = Session(built_pte), tmp_path / "run.jsonl"
    if resumed:
        Session(built_pte).fit(tiny.make_batches(3), 3, lr=Jump(2, TOO_LARGE), **RUN, journal=journal)
    for _ in range(2):  # once more: a journal does not lead around the step that failed
        with pytest.raises(NonFiniteLossError, match=r"Step 3 .* smaller learning rate") as caught:
            session.fit(tiny.make_batches(3), 5, lr=Jump(2, TOO_LARGE), **RUN, journal=journal)
        assert caught.value.good_steps == 2
        assert caught.value.last_good is not None
        assert same(caught.value.last_good, after(built_pte, 2))
        # The session stays where the journal ends.
        assert len(runtime_driver.read_journal(journal).records) == 3
        again = Session(built_pte)
        again.replay(journal)
        assert same(session.adapter, again.adapter)


@pytest.mark.parametrize("step", [0, 2])
def test_nan_in_the_data_is_called_that(session: Session, step: int):
    batches = tiny.make_batches(3)
    batches[step]["x"][1, 2] = float("nan")
    with pytest.raises(NonFiniteLossError, match="`x` holds NaN or infinity: correct the data") as caught:
        session.fit(batches, 3, lr=0.5, **RUN)
    assert "learning rate" not in str(caught.value)


def test_nan_before_any_update_is_the_programs(built_pte: Path):
    session = Session(built_pte)
    session.adapter = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), 3e38)}
    with pytest.raises(NonFiniteLossError, match=r"the program gives this .* `loss`, `losses\[0\]`") as caught:
        session.fit(tiny.make_batches(3), 3, lr=0.5, **RUN)
    assert "learning rate" not in str(caught.value)
    assert caught.value.before_any_update
    assert caught.value.last_good is None


def test_gradients_alone_that_overflow_ask_for_a_larger_epsilon(session: Session):
    with pytest.raises(NonFiniteLossError, match="try a larger epsilon") as caught:
        session.fit(tiny.make_batches(3), 3, lr=0.5, eps=1e-45)
    assert caught.value.outputs == ("projected_gradients",)


def test_an_adapter_that_is_not_finite_is_not_saved(session: Session, tmp_path: Path):
    # Assigning `session.adapter` would refuse it.
    session._executor.adapter = {tiny.FQN_B: torch.full((tiny.CLASSES, tiny.RANK), float("inf"))}
    with pytest.raises(NonFiniteAdapterError, match="6 of 6 values"):
        session.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_journal_that_records_an_overflow_is_replayed_up_to_it(built_pte: Path, tmp_path: Path):
    """As version 0.1 wrote them: it checked losses and gradients only."""
    from runtime_driver.journal import JournalWriter, read_journal

    path = tmp_path / "run.jsonl"
    Session(built_pte).fit(tiny.make_batches(3), 3, lr=0.5, **RUN, journal=path)
    contents = read_journal(path)
    last = contents.records[-1]
    path.unlink()
    with JournalWriter(path) as journal:
        journal.begin(contents.header)
        for record in contents.records[:-1]:
            journal.append(record)
        journal.append(type(last)(last.step, last.seed, OVERFLOW_32, last.eps, last.projected_gradients, last.loss))
    session = Session(built_pte)
    with pytest.raises(NonFiniteAdapterError, match=r"update of step 2 .* ask for fewer steps"):
        session.replay(path)
    assert session.replay(path, 2) == 2


OVERFLOW_32 = float(torch.tensor(OVERFLOW))
