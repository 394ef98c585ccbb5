"""A program whose weights are in a file of their own: found, checked, and missed in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime_driver import Session, WeightsFileError
from runtime_driver.format import Manifest, ManifestError
from tests.driver import tiny

RUN: dict[str, Any] = {"lr": 0.1, "eps": 0.1}


@pytest.fixture
def program(pte_with_weights_file: Path) -> Path:
    return pte_with_weights_file


def test_it_trains_as_one_with_its_weights_inside(program: Path, built_pte: Path):
    runs = []
    for path in (program, built_pte):
        session = Session(path)
        result = session.fit(tiny.make_batches(2), 6, **RUN)
        logits = session.predict(tiny.make_batches(1)[0])
        runs.append((result.losses, session.adapter[tiny.FQN_B], logits, session.evaluate(tiny.make_batches(2)).loss))
    (losses, adapter, logits, loss), (losses_, adapter_, logits_, loss_) = runs
    assert (losses, loss) == (losses_, loss_)
    assert torch.equal(adapter, adapter_)
    assert torch.equal(logits, logits_)


def test_weights_elsewhere_are_named(program: Path, tmp_path: Path):
    elsewhere = tmp_path / "shared" / "base.ptd"
    elsewhere.parent.mkdir()
    program.with_suffix(".ptd").rename(elsewhere)
    assert len(Session(program, weights_file=elsewhere).fit(tiny.make_batches(1), 2, **RUN).losses) == 2


def gone(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # a bit of a weight
    path.write_bytes(data)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = [
    (gone, "no such file, and .* keeps its weights in it"),
    (truncated, "expected [0-9]+ bytes, found [0-9]+"),
    (other, "expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    (a_directory, "cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS, ids=lambda each: getattr(each, "__name__", ""))
def test_what_is_wrong_with_it_is_said_before_anything_is_written(
    program: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
):
    damage(program.with_suffix(".ptd"))
    session = Session(program)
    for use in (
        lambda: session.fit(tiny.make_batches(1), 2, journal=tmp_path / "run.jsonl", **RUN),
        lambda: session.evaluate(tiny.make_batches(1)),
        lambda: session.predict(tiny.make_batches(1)[0]),
    ):
        with pytest.raises(WeightsFileError, match=message) as caught:
            use()
        assert str(program.with_suffix(".ptd")) in str(caught.value)
        assert "--weights-file" in str(caught.value)
    assert not (tmp_path / "run.jsonl").exists()


def test_an_interrupted_run_without_its_weights_loses_nothing(program: Path, tmp_path: Path):
    journal, weights = tmp_path / "run.jsonl", program.with_suffix(".ptd")
    Session(program).fit(tiny.make_batches(2), 3, journal=journal, **RUN)
    before = journal.read_bytes()
    weights.rename(tmp_path / "away.ptd")
    with pytest.raises(WeightsFileError):
        Session(program).fit(tiny.make_batches(2), 5, journal=journal, **RUN)
    assert journal.read_bytes() == before
    session = Session(program, tmp_path / "away.ptd")
    session.fit(tiny.make_batches(2), 5, journal=journal, **RUN)
    whole = Session(program, tmp_path / "away.ptd")
    whole.fit(tiny.make_batches(2), 5, **RUN)
    assert torch.equal(session.adapter[tiny.FQN_B], whole.adapter[tiny.FQN_B])


def test_replay_needs_no_weights(program: Path, tmp_path: Path):
    session = Session(program)
    session.fit(tiny.make_batches(2), 3, journal=tmp_path / "run.jsonl", **RUN)
    program.with_suffix(".ptd").unlink()
    again = Session(program)
    assert again.replay(tmp_path / "run.jsonl") == 3
    assert torch.equal(again.adapter[tiny.FQN_B], session.adapter[tiny.FQN_B])


def test_a_weights_file_for_a_program_without_one_is_refused(pte: Path, tmp_path: Path):
    with pytest.raises(WeightsFileError, match=r"has its weights inside\. Leave the weights file out"):
        Session(pte, weights_file=tmp_path / "base.ptd")


@pytest.mark.parametrize("file", ["../base.ptd", "a/b.ptd", "C:\\b.ptd", ""])
def test_a_manifest_names_a_file_beside_the_program_only(file: str):
    spec = {"file": file, "sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ManifestError, match=r"weights_file\.file"):
        Manifest.from_dict(tiny.manifest_dict(weights_file=spec))
