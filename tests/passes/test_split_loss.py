"""SplitLoss: what `loss` returns adds up over batches to the eager loss of the whole data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.batching import Batch
from mobizo_passes.capture.inputs import name_inputs
from mobizo_passes.graph.ir import Ir
from mobizo_passes.passes import SplitLoss
from mobizo_passes.zo.combination import Combination, Term
from runtime_driver.combining import LossTotals
from runtime_driver.format import EvaluationSpec
from tests.coverage.row import Row
from tests.coverage.written_rows import LOSSES
from tests.models import Block, Lora, Mlp, SequenceFirst, integers, random, seeded
from tests.passes.contract import PassContract, parsed

ROWS = 3
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 3.0])
Loss = Callable[..., Tensor]


def combined(program: mz.TrainingProgram, model: nn.Module, data: Mapping[str, Tensor], rows: int) -> float:
    """The loss of the first `rows` rows of data, cut into batches that are filled up with their last row."""
    labels, spec = program.labels, program.manifest()["evaluation"]
    assert not spec["refusal"], spec["refusal"]
    totals = LossTotals(EvaluationSpec.model_validate(spec))
    for start in range(0, rows, labels["size"]):
        real = min(labels["size"], rows - start)
        at = torch.tensor([min(start + i, start + real - 1) for i in range(labels["size"])])
        batch = {k: v if labels["dims"][k] is None else v.index_select(labels["dims"][k], at) for k, v in data.items()}
        outputs = program._methods["loss"].run({**program.initial_adapter(), **batch})
        totals.add(outputs, real)
    return totals.value


def check(model: nn.Module, data: Mapping[str, Tensor], loss: Loss | None, **options: Any) -> mz.TrainingProgram:
    """`data` holds seven rows; the program takes three."""
    dim = options.get("batch_dim", 0)

    def cut(v: Tensor, rows: int) -> Tensor:
        at = min(dim, v.dim() - 1)
        return v.narrow(at, 0, rows) if v.dim() and v.shape[at] == 7 else v

    example = {k: cut(v, ROWS) for k, v in data.items()}
    program = mz.transform(model, example, loss=loss, estimator=mz.TwoSided(1), **options)
    for rows in (7, 6, 2):
        part = {k: cut(v, rows) for k, v in data.items()}
        wanted = mz.reference.loss_of(model, part, program.initial_adapter(), loss)
        assert combined(program, model, part, rows) == pytest.approx(float(wanted), rel=1e-6, abs=1e-7)
    return program


CLASSES: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "one value per example": lambda o, y: F.cross_entropy(o, y, reduction="none"),
    "focal": lambda o, y: (
        (1 - torch.exp(-(c := F.cross_entropy(o, y, reduction="none")))) ** 2 * c
    ).mean(),
    "focal of a mean": lambda o, y: (1 - torch.exp(-F.cross_entropy(o, y))) ** 2 * F.cross_entropy(o, y),
    "sum": lambda o, y: F.cross_entropy(o, y, reduction="sum"),
    "class weights": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS),
    "class weights and smoothing": lambda o, y: F.cross_entropy(o, y, weight=WEIGHTS, label_smoothing=0.2),
    "an ignored class": lambda o, y: F.cross_entropy(o, y, ignore_index=1),
    "ignored and smoothed": lambda o, y: F.cross_entropy(o, y, ignore_index=1, label_smoothing=0.2),
    "nll": lambda o, y: F.nll_loss(o.log_softmax(-1), y, WEIGHTS),
    "sum over the batch's size": lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y),
    "mean with a number that is the batch's size": lambda o, y: F.cross_entropy(o, y) / 3,
    "sum over a number": lambda o, y: F.cross_entropy(o, y, reduction="sum") / 6,
    "divided inside": lambda o, y: (F.cross_entropy(o, y, reduction="none") / len(y)).sum(),
    "several reductions": lambda o, y: F.cross_entropy(o, y) + 0.1 * o.square().sum() - o.abs().mean() / 7,
    "margin": lambda o, y: F.relu(1 - o[:, 0] * (y - 1.5)).mean().clamp(min=0.01),
}  # fmt: skip
NUMBERS: dict[str, Loss] = {
    "mse": F.mse_loss,
    "root of a mean": lambda o, y: F.mse_loss(o, y).sqrt(),
    "pos_weight": lambda o, y: F.binary_cross_entropy_with_logits(o, y, pos_weight=WEIGHTS),
    "batchmean": lambda o, y: F.kl_div(o.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "soft targets": lambda o, y: F.cross_entropy(o, y.softmax(-1), weight=WEIGHTS),
    "masked mean": lambda o, y: ((o - y).square() * (y > 0.5)).sum() / (y > 0.5).sum(),
    "masked mean, guarded": lambda o, y: (F.l1_loss(o, y, reduction="none") * y).sum() / y.sum().clamp(min=1e-6),
    "mean over outputs, then over rows": lambda o, y: F.huber_loss(o, y, reduction="none").mean(-1).mean(),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_losses(name: str) -> None:
    check(seeded(Mlp()), {"x": random(7, 6), "y": integers(4, 7)}, CLASSES[name])


@pytest.mark.parametrize("name", NUMBERS)
def test_losses_of_numbers(name: str) -> None:
    check(seeded(Mlp()), {"x": random(7, 6), "y": random(7, 4, seed=3).sigmoid()}, NUMBERS[name])


@pytest.mark.parametrize("row", LOSSES, ids=str)
def test_losses_of_the_coverage_table(row: Row) -> None:
    loss, model, example = row.options.get("loss"), row.build(), row.inputs()
    three = name_inputs(model, example, loss).tensors
    # Seven rows, no two batches of them alike.
    check(model, {name: value[[0, 1, 2, 1, 0, 2, 2]] for name, value in three.items()}, loss)


def tokens(count: bool = False) -> dict[str, Tensor]:
    labels = integers(11, 7, 5, seed=2)
    labels[:, :3] = -100
    labels[1, 3] = labels[4, 1] = 6
    labels[2, 4] = -100
    data = {"tokens": integers(11, 7, 5), "labels": labels}
    return {"num_items_in_batch": (labels != -100).sum(), **data} if count else data


def shifted(o: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(o[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_token_means_weigh_labels() -> None:
    check(seeded(Block()), tokens(), shifted, max_labels=4)


def test_a_mean_per_example_then_over_examples() -> None:
    def loss(o: Tensor, labels: Tensor) -> Tensor:
        each = F.cross_entropy(o.transpose(1, 2), labels, reduction="none")
        return (each.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()

    check(seeded(Block()), tokens(), loss)


def test_a_penalty_on_the_adapter_counts_once() -> None:
    class Penalized(Mlp):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            out = super().forward(x)
            return F.cross_entropy(out, y) + 0.1 * self.first.widen.square().sum(), out

    check(seeded(Penalized()), {"x": random(7, 6), "y": integers(4, 7)}, None)


def test_a_count_given_with_the_batch_adds_up() -> None:
    def loss(o: Tensor, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        flat = o[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    data, model = tokens(), seeded(Block())
    cut = [{k: v[i : i + ROWS] for k, v in data.items()} for i in (0, 3)]
    counts = [(b["labels"][:, 1:] != -100).sum() for b in cut]
    program = mz.transform(model, {"num_items_in_batch": counts[0], **cut[0]}, loss=loss, max_labels=4)
    assert (program.labels["size"], program.labels["dims"]["num_items_in_batch"]) == (3, None)
    totals = LossTotals(EvaluationSpec.model_validate(program.manifest()["evaluation"]))
    for batch, count in zip(cut, counts, strict=True):
        inputs = {**program.initial_adapter(), **batch, "num_items_in_batch": count}
        totals.add(program._methods["loss"].run(inputs), ROWS)
    whole = {k: v[:6] for k, v in data.items()}
    with torch.no_grad():
        wanted = shifted(model(whole["tokens"]), whole["labels"])
    assert totals.value == pytest.approx(float(wanted), rel=1e-6)


def test_a_batch_in_another_dimension() -> None:
    check(seeded(SequenceFirst()), {"x": random(5, 7, 6), "y": integers(4, 7)}, F.cross_entropy, batch_dim=1)


class Positions(nn.Module):
    """Takes positions and a mask of positions beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(9, 6), Lora(6, 8), nn.Linear(8, 4)

    def forward(self, positions: Tensor, scale: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        h = self.layer(x * scale + self.table(positions))
        return self.head(F.scaled_dot_product_attention(h, h, h, attn_mask=mask).mean(1))


@pytest.mark.parametrize("length", [3, 5])
def test_inputs_without_a_batch_may_be_as_long_as_the_batch(length: int) -> None:
    data = {"positions": torch.arange(length), "scale": torch.tensor(0.7), "mask": random(length, length),
            "x": random(7, length, 6), "y": integers(4, 7)}  # fmt: skip
    program = check(seeded(Positions()), data, F.cross_entropy)
    assert program.labels["size"] == 3
    assert program.labels["dims"] == {"positions": None, "scale": None, "mask": None, "x": 0, "y": 0}
    assert program.labels["class_inputs"] == ["y"]


def test_class_weights_as_many_as_examples() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Lora(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def loss(o: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, weight=weight)

    data = {"weight": torch.tensor([1.0, 2.0, 0.5]), "x": random(7, 6), "y": integers(3, 7)}
    assert check(seeded(Three()), data, loss).labels["dims"] == {"weight": None, "x": 0, "y": 0}


WHOLE: dict[str, tuple[Loss, str]] = {
    "normalized by the batch": (lambda o, y: ((o - y) / y.std()).square().mean(), "examples see one another"),
    "weighed against the batch": (lambda o, y: (o.square() * y.softmax(0)).sum(), "examples see one another"),
    "by the largest": (lambda o, y: o.square().mean() / y.max(), r"put together by %max_1 = aten.max.default"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_losses_that_do_not_come_apart_say_why(name: str) -> None:
    loss, reason = WHOLE[name]
    data = (random(ROWS, 6), random(ROWS, 4, seed=3))
    program = mz.transform(seeded(Mlp()), data, loss=loss, estimator=mz.TwoSided(1))
    spec = program.manifest()["evaluation"]
    assert not spec["terms"]
    with pytest.raises(AssertionError, match=reason):
        assert not spec["refusal"], spec["refusal"]
    assert [o["name"] for o in program.manifest()["methods"]["loss"]["outputs"]] == ["loss"]


class TestSplitLoss(PassContract):
    one = SplitLoss(Batch(2, {"x": 0, "target": 0}))
    before = """
        %b: f32[4] = adapter 'b'
        %x: f32[2, 4] = batch 'x'
        %target: i64[2] = batch 'target'

        %y: f32[2, 4] = aten.add(%x, %b)
        %loss: f32[] = aten.cross_entropy_loss(%y, %target)

        return %loss: f32[] = loss
    """
    after = """
        %b: f32[4] = adapter 'b'
        %x: f32[2, 4] = batch 'x'
        %target: i64[2] = batch 'target'

        %y: f32[2, 4] = aten.add(%x, %b)
        %cross_entropy_loss: f32[2] = aten.cross_entropy_loss(%y, %target, None, 0, -100, 0.0)  # | split-loss
        %ne: b8[2] = aten.ne(%target, -100)  # | split-loss
        %_to_copy: f32[2] = aten._to_copy(%ne, dtype=f32)  # | split-loss
        %row_sums: f32[2] = mobizo.row_sums(%cross_entropy_loss, 0, 1, 2)  # | split-loss
        %sum_1: f32[] = aten.sum(%row_sums, [0])  # | split-loss
        %row_sums_1: f32[2] = mobizo.row_sums(%_to_copy, 0, 1, 2)  # | split-loss
        %sum_2: f32[] = aten.sum(%row_sums_1, [0])  # | split-loss
        %div: f32[] = aten.div(%sum_1, %sum_2)  # | split-loss

        return %div: f32[] = loss
        return %row_sums: f32[2] = loss_sum 'loss_sum_0'
        return %row_sums_1: f32[2] = loss_weight 'loss_weight_0'
    """

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        want, got = old.run(values), new.run(values)
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["loss_sum_0"].sum() / got["loss_weight_0"].sum(), want["loss"])

    def test_how_the_parts_combine(self) -> None:
        _, new = self.run_pass()
        assert new.combination == Combination(terms=(Term(mean=True, weighted=True),))

    @pytest.mark.parametrize("reduction", ["aten.max(%y)", "aten.median(%y)"])
    def test_a_reduction_without_a_rule_is_left_whole(self, reduction: str) -> None:
        ir = parsed(re.sub(r"aten.cross_entropy_loss\(.*\)", reduction, self.before))
        assert self.one(ir) == 0
        assert [spec.name for spec in ir.outputs] == ["loss"]
        assert ir.combination is not None
        assert ir.combination.refusal


def test_random_numbers_and_model_stay_as_they_are() -> None:
    model = seeded(Mlp())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mz.transform(model, (random(ROWS, 6), integers(4, ROWS)), loss=F.cross_entropy)
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
