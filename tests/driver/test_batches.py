"""Batches are bound by name and checked before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from runtime_driver import BatchError, DataExhaustedError, LabelError, Session
from tests.driver import tiny

RUN: dict[str, Any] = {"lr": 0.5, "eps": 1e-2}


def good() -> dict[str, torch.Tensor]:
    return tiny.make_batches(1)[0]


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({"x": None}, "x", "is missing; the batch has"),
        ({"label": None}, "label", "is missing"),
        ({"mask": torch.zeros(4)}, "mask", r"not an input of the program, which takes \['x', 'label'\]"),
        ({"x": torch.zeros(4, 6, dtype=torch.float64)}, "x", "expected dtype float32, found float64"),
        ({"label": torch.zeros(4, dtype=torch.int32)}, "label", "expected dtype int64, found int32"),
        ({"x": torch.zeros(4, 5)}, "x", r"expected shape \[4, 6\], found \[4, 5\]"),
        ({"x": torch.zeros(3, 6)}, "x", r"expected shape \[4, 6\], found \[3, 6\]"),
        ({"x": torch.zeros(4, 6, 1)}, "x", "expected shape"),
        ({"x": [[0.0] * 6] * 4}, "x", "expected a torch.Tensor, found list"),
    ],
)
def test_unfit_batches(session: Session, tmp_path: Path, change: dict, name: str, message: str):
    batch = {key: value for key, value in {**good(), **change}.items() if value is not None}
    for use in (
        lambda: session.step(batch, 0, **RUN),
        lambda: session.fit([batch], 1, **RUN, journal=tmp_path / "run.jsonl"),
    ):
        with pytest.raises(BatchError, match=message) as caught:
            use()
        assert caught.value.name == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 3], r"expected a label in \[0, 3\) or -100, which is ignored, found 3"),
        ([0, 1, -1, 2], r"found -1"),
        ([-100] * 4, "no position is labelled"),
    ],
)
def test_labels_out_of_range(session: Session, labels: list[int], message: str):
    with pytest.raises(LabelError, match=message):
        session.step({**good(), "label": torch.tensor(labels)}, 0, **RUN)
    assert session.program.resident_methods() == ()


def token_labels(**changes):
    """A binder for labels of shape [B, T], which the tiny program itself does not have."""
    from runtime_driver.batches import BatchBinder
    from runtime_driver.format import Manifest

    data = tiny.manifest_dict()
    for method in data["methods"].values():
        for item in method["inputs"]:
            if item["name"] == "label":
                item["shape"] = [4, 5]
    data["batch"].update(changes)
    return BatchBinder(Manifest.from_dict(data))


def labelled_at(*positions: int) -> dict[str, torch.Tensor]:
    labels = torch.full((4, 5), -100)
    for position in positions:
        labels[2, position] = 1
    return {**good(), "label": labels}


def test_more_labels_than_the_program_reads():
    with pytest.raises(LabelError, match="row 2 has 2 labelled positions, the program reads at most 1"):
        token_labels().bind("step", labelled_at(3, 4))
    token_labels(max_labels=2).bind("step", labelled_at(3, 4))
    token_labels(max_labels=None).bind("step", labelled_at(1, 2, 3, 4))


def test_position_0_never_counts_when_the_model_shifts():
    token_labels(shift=True).bind("step", labelled_at(0, 4))
    with pytest.raises(LabelError, match="at most 1"):
        token_labels(shift=False).bind("step", labelled_at(0, 4))
    with pytest.raises(LabelError, match="no position is labelled"):
        token_labels(shift=True).bind("step", labelled_at(0))
    assert token_labels(shift=True).labelled(labelled_at(0, 4)) == 1


def test_label_words_bound_the_labels():
    from runtime_driver.batches import BatchBinder
    from runtime_driver.format import Manifest

    binder = BatchBinder(Manifest.from_dict(tiny.manifest_dict(application={"label_words": ["bad", "good"]})))
    with pytest.raises(LabelError, match=r"\[0, 2\)"):
        binder.bind("step", {**good(), "label": torch.tensor([0, 1, 2, 0])})


def test_strided_tensors_are_fine(session: Session):
    batch = good()
    strided = {"x": batch["x"].t().contiguous().t(), "label": torch.stack([batch["label"]] * 2, 1)[:, 0]}
    assert not strided["x"].is_contiguous()
    assert session.step(strided, 0, **RUN, update=False).loss == session.step(batch, 0, **RUN).loss


def test_predict_needs_no_labels_and_takes_fewer_rows(session: Session):
    session.fit(tiny.make_batches(3), 5, **RUN)
    batch = good()
    whole = session.predict({"x": batch["x"]})
    assert whole.shape == (4, 3)
    expected = batch["x"] @ tiny.frozen_a().t() @ session.adapter[tiny.FQN_B].t()
    torch.testing.assert_close(whole, expected)
    assert torch.equal(session.predict({"x": batch["x"][:3]}), whole[:3])


def test_evaluation_weighs_an_incomplete_batch_rightly(session: Session):
    session.fit(tiny.make_batches(3), 5, **RUN)
    full, rest = tiny.make_batches(2, seed=5)
    rest = {name: tensor[:1] for name, tensor in rest.items()}
    result = session.evaluate([full, rest], label_ids=[0, 1, 2])
    x, label = torch.cat([full["x"], rest["x"]]), torch.cat([full["label"], rest["label"]])
    logits = x @ tiny.frozen_a().t() @ session.adapter[tiny.FQN_B].t()
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, label)), rel=1e-5)
    assert result.correct == int((logits.argmax(-1) == label).sum())
    assert result.examples == 5
    assert session.evaluate([full, rest], label_ids=[0, 1, 2], loss=False).loss is None


def test_version_1_does_not_say_how_an_incomplete_batch_counts(tmp_path: Path):
    batch = {**tiny.manifest_dict()["batch"], "ignore_index": None, "max_labels": None}
    plain = Session(tiny.build(tmp_path / "model.pte", manifest=json.dumps(tiny.manifest_dict(batch=batch))))
    full = good()
    assert plain.evaluate([full, full]).loss == pytest.approx(plain.batch_loss(full))
    part = {name: tensor[:3] for name, tensor in full.items()}
    for call in (lambda: plain.batch_loss(part), lambda: plain.evaluate([full, part])):
        with pytest.raises(BatchError, match="3 rows of 4, and a program of format version 1 does not say"):
            call()


def test_unfit_evaluation_batches_are_found_before_training(session: Session, tmp_path: Path):
    with pytest.raises(BatchError, match="`x`: is missing"):
        session.fit(
            tiny.make_batches(1),
            5,
            **RUN,
            journal=tmp_path / "run.jsonl",
            eval_batches=[good(), {"label": good()["label"]}],
        )
    assert list(tmp_path.iterdir()) == []


def test_label_ids_choose_columns(session: Session):
    session.fit(tiny.make_batches(3), 5, **RUN)
    batch = good()
    both = {**batch, "label": torch.tensor([0, 1, 0, 1])}
    predicted = session.predict(batch)[:, [2, 0]].argmax(-1)
    assert session.evaluate([both], label_ids=[2, 0]).correct == int((predicted == both["label"]).sum())
    with pytest.raises(LabelError, match=r"labels in \[0, 1\)"):
        session.evaluate([both], label_ids=[2])


def test_training_refuses_an_incomplete_batch(session: Session):
    with pytest.raises(BatchError, match="expected shape"):
        session.fit([{name: tensor[:3] for name, tensor in good().items()}], 1, **RUN)


def test_nothing_to_evaluate(session: Session):
    with pytest.raises(BatchError, match="no batches"):
        session.evaluate([])


@pytest.mark.parametrize("batches", [[], iter([])])
def test_nothing_to_train_on(session: Session, tmp_path: Path, batches):
    with pytest.raises(DataExhaustedError, match="before step 0 of 3"):
        session.fit(batches, 3, **RUN, journal=tmp_path / "run.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", [None, 3, {"x": torch.zeros(4, 6)}])
def test_not_batches(session: Session, batches):
    with pytest.raises(BatchError, match="expected batches"):
        session.fit(batches, 3, **RUN)


def test_every_kind_of_batches_gives_the_same_run(built_pte: Path, tmp_path: Path):
    batches = tiny.make_batches(6)

    class Source:
        def batch(self, step: int):
            return batches[step]

    adapters = []
    for kind in (lambda: batches, lambda: iter(batches), Source):
        path = tmp_path / f"{len(adapters)}.jsonl"
        for steps in (2, 6):
            session = Session(built_pte)
            session.fit(kind(), steps, **RUN, journal=path)
        adapters.append(session.adapter[tiny.FQN_B])
    assert torch.equal(adapters[0], adapters[1])
    assert torch.equal(adapters[0], adapters[2])


@pytest.mark.parametrize("named", [True, False])
def test_a_data_loader_gives_epochs(built_pte: Path, tmp_path: Path, named: bool):
    made = tiny.make_batches(3)
    names = list(Session(built_pte).manifest.batch.inputs)
    columns = [torch.cat([batch[name] for batch in made]) for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    data: Any = rows if named else TensorDataset(*columns)
    loader: Any = DataLoader(data, batch_size=len(columns[0]) // 3)
    expected = Session(built_pte)
    expected.fit(made, 7, **RUN)
    for steps in (4, 7):  # resumed in the second epoch
        session = Session(built_pte)
        session.fit(loader, steps, **RUN, journal=tmp_path / "run.jsonl")
    assert torch.equal(session.adapter[tiny.FQN_B], expected.adapter[tiny.FQN_B])
    assert session.evaluate(loader) == expected.evaluate(made)


def test_a_list_of_tensors_has_one_for_each_input(session: Session):
    with pytest.raises(BatchError, match="has 1 tensors, the program takes"):
        session.fit([[torch.zeros(2)]], 1, **RUN)
