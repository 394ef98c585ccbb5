"""The testing kit finds faults, and says where they are."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings

import mobizo_passes as mz
from mobizo_passes.batching import RULES
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments, set_arguments
from mobizo_passes.graph.passes import Pass
from mobizo_passes.reverse.table import RULES as DERIVATIVES
from mobizo_passes.reverse.table import Row
from mobizo_passes.testing import agreement, check_agreement, drawing, strategies
from mobizo_passes.testing.derivatives import wrong_gradient, wrong_tangent
from mobizo_passes.testing.models import integers, random, seeded
from tests.models import case
from tests.passes.contract import Tiny, rows

HOW_TO = Path(__file__).resolve().parents[2] / "docs/how-to/testing.md"
aten = torch.ops.aten


@pytest.fixture
def without_shrinking() -> Iterator[None]:
    """The first failing example will do."""
    settings.register_profile("first", settings(), phases=[Phase.generate])
    profile = settings.get_current_profile_name()
    settings.load_profile("first")
    yield
    settings.load_profile(profile)


@pytest.fixture
def softmax_over_features(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[aten.softmax.int]

    def wrong(batcher: Any, node: Any) -> Any:
        layout = rule(batcher, node)
        set_arguments(node, dim=-1)
        return layout

    monkeypatch.setitem(RULES, aten.softmax.int, wrong)


@pytest.mark.usefixtures("without_shrinking", "softmax_over_features")
def test_the_how_tos_test_finds_a_wrong_batching_rule(tmp_path: Path):
    model, test, *_ = re.findall(r"^```python\n(.*?)^```", HOW_TO.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(test.strip().splitlines()) <= 15
    path = tmp_path / "test_pool.py"
    path.write_text(f"{model}\n{test}", encoding="utf-8")
    line = 1 + path.read_text(encoding="utf-8").splitlines().index(
        "        weights = torch.softmax(self.keys(x), dim=1)"
    )
    spec = importlib.util.spec_from_file_location("test_pool", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(mz.VerificationFailed) as failed:
        module.test_steps_agree()
    where = rf"%softmax\S* = aten\.softmax\.int in module '<top level>', test_pool\.py, line {line}, in forward"
    assert re.search(rf"first difference: after expand-perturbations, in group \d.*\n  {where}", str(failed.value))


class TanhIsRelu(Pass):
    name: ClassVar[str] = "tanh-is-relu"

    def rewrite(self, ir: Ir) -> int:
        for node in ir.find(aten.tanh.default):
            node.target = aten.relu.default
        return 1


def check(name: str, **options: Any) -> None:
    known = case(name)
    check_agreement(known.build(), known.inputs(), **known.options, **options)


def test_a_wrong_pass_is_named(monkeypatch: pytest.MonkeyPatch):
    right = mz.OneSided.loss_passes
    monkeypatch.setattr(mz.OneSided, "loss_passes", lambda *given: (TanhIsRelu(), *right(*given)))
    with pytest.raises(
        mz.VerificationFailed, match=r"after tanh-is-relu, in group \d.*\n  %tanh = aten\.relu\.default"
    ):
        check("transposed", estimator=mz.OneSided(1))


def test_a_rule_whose_program_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch):
    rule = RULES[aten.index.Tensor]

    def wrong(batcher: Any, node: Any) -> Any:
        layout = rule(batcher, node)
        rows = arguments(node).indices[0]
        set_arguments(node, indices=[rows, rows])
        return layout

    monkeypatch.setitem(RULES, aten.index.Tensor, wrong)
    with pytest.raises(
        mz.VerificationFailed, match=r"out of bounds(.|\n)*not computed at all:\n  %index = aten\.index"
    ):
        check("last-row", estimator=mz.OneSided(1))


def test_another_model_than_the_programs_is_found():
    program = mz.transform(seeded(Tiny()), rows(), loss=F.cross_entropy, estimator=mz.OneSided(1))
    with pytest.raises(mz.VerificationFailed, match="the loss of the captured model, beside the model's own"):
        check_agreement(seeded(Tiny(), seed=1), rows(), program=program)
    with pytest.raises(mz.InputError, match="the program is made already: leave out noise"):
        check_agreement(seeded(Tiny()), rows(), program=program, noise="gaussian")
    with pytest.raises(mz.InputError, match="steps must be at least 1"):
        check_agreement(seeded(Tiny()), rows(), program=program, steps=0)


def with_derivative(monkeypatch: pytest.MonkeyPatch, op: Any, argument: str, rule: Any) -> None:
    row = DERIVATIVES[op]
    monkeypatch.setitem(DERIVATIVES, op, Row(row.kind, {**row.rules, argument: rule}))


@pytest.mark.parametrize(
    ("estimator", "where"),
    [
        (mz.ForwardGradient(2), "after linearize, the tangent in the first direction"),
        (mz.Exact(), "after append-gradients, the gradient that it hands back to %add"),
    ],
    ids=str,
)
def test_the_operator_of_a_wrong_derivative_is_named(
    monkeypatch: pytest.MonkeyPatch, estimator: mz.Estimator, where: str
):
    with_derivative(monkeypatch, aten.tanh.default, "self", lambda n, g: g * (1.0 - n.out))
    named = r"%tanh = aten\.tanh\.default in module '<top level>', models\.py, line"
    with pytest.raises(mz.VerificationFailed, match=rf"first difference: {where}, off by .*\n  {named}"):
        check("transposed", estimator=estimator)


def test_a_gradient_that_several_operators_hand_back(monkeypatch: pytest.MonkeyPatch):
    text = """
    %b: f32[4, 3] = adapter 'b'
    %x: f32[2, 3] = batch 'x'
    %h: f32[2, 4] = aten.linear(%x, %b)
    %t: f32[2, 4] = aten.tanh(%h)
    %v: (f32[2], i64[2]) = aten.max(%h, 1)
    %m: f32[2] = getitem(%v, 0)
    %s: f32[2] = aten.sum(%t, [1])
    %d: f32[2] = aten.add(%s, %m)
    %l: f32[] = aten.mean(%d)
    return %l: f32[] = loss
    """
    ir, values = mz.parse(text), {"b": random(4, 3), "x": random(2, 3, seed=2)}
    assert wrong_gradient(ir, values) is None
    with_derivative(monkeypatch, aten.tanh.default, "self", lambda n, g: g * n.out)
    found = wrong_gradient(ir, values)
    assert found is not None
    assert found[0].name == "h"
    assert found[2] == "the gradient of a value that several operators read (%t = aten.tanh.default, %v = aten.max.dim)"
    losses = mz.parse(text.replace("f32[] = loss", "f32[] = losses"))
    found = wrong_tangent(losses, values, {"b": random(4, 3, seed=3)})
    assert found is not None
    assert found[0].name == "t"


@pytest.mark.parametrize(
    ("estimator", "what"),
    [
        (mz.OneSided(1), "all values agree up to the losses"),
        (mz.ForwardGradient(1), "all values agree .* all derivatives operator by operator"),
        (mz.Exact(), "all values agree .* all derivatives operator by operator"),
    ],
    ids=str,
)
def test_what_differs_behind_the_losses_is_told(monkeypatch: pytest.MonkeyPatch, estimator: mz.Estimator, what: str):
    def differs(*_: Any, **__: Any) -> None:
        raise mz.VerificationFailed("projected gradient of query 0")

    monkeypatch.setattr(agreement, "verify", differs)
    with pytest.raises(mz.VerificationFailed, match=rf"projected gradient of query 0\n{what}"):
        check("block-tokens", estimator=estimator)


@pytest.mark.parametrize("estimator", [mz.TwoSided(2, normalize="std"), mz.ForwardGradient(1), mz.Exact()])
def test_steps_in_a_row_agree(estimator: mz.Estimator):
    check("sequence-first", estimator=estimator, optimizer=mz.AdamW(), steps=3)


EXAMPLE = {
    "x": random(2, 3),
    "mask": integers(2, 2, 3),
    "labels": torch.tensor([[-100, 4, 2], [-100, -100, 3]]),
    "n": 2,
}


@settings(max_examples=5)
@given(batch=strategies.batches(EXAMPLE, keep=["mask"]))
def test_batches_have_the_form_of_their_example(batch: dict[str, Any]):
    assert list(batch) == list(EXAMPLE)
    assert batch["x"].shape == (2, 3)
    assert not torch.equal(batch["x"], EXAMPLE["x"])
    assert batch["mask"] is EXAMPLE["mask"]
    assert torch.equal(batch["labels"] == -100, EXAMPLE["labels"] == -100)
    assert {*batch["labels"].flatten().tolist()} <= {-100, 2, 3, 4}


def test_strategies_without_hypothesis_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(mz.LibraryMissing, match="pip install hypothesis"):
        importlib.reload(drawing)
