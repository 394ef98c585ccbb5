"""A user's own operator: refused by name, then registered with a rule that is tried first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.batching import RULES
from mobizo_passes.testing import check_rule
from tests.models import random, seeded
from tests.passes.contract import Tiny, rows


@torch.library.custom_op("mobizo_tests::squash", mutates_args=())
def squash(x: Tensor, scale: float = 2.0) -> Tensor:
    """Element-wise."""
    return torch.tanh(x * scale)


@torch.library.custom_op("mobizo_tests::rms", mutates_args=())
def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Each row over its last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@torch.library.custom_op("mobizo_tests::center", mutates_args=())
def center(x: Tensor, dim: int) -> Tensor:
    """Independent along every dimension but `dim`."""
    return x - x.mean(dim, keepdim=True)


@torch.library.custom_op("mobizo_tests::halves", mutates_args=())
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two results for each row."""
    half = x.shape[-1] // 2
    return x[..., :half].clone(), x[..., half:].clone()


@squash.register_fake
def _(x: Tensor, scale: float = 2.0) -> Tensor:
    return torch.empty_like(x)


@rms.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x)


@center.register_fake
def _(x: Tensor, dim: int) -> Tensor:
    return torch.empty_like(x)


@halves.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x.new_empty((*x.shape[:-1], half)), x.new_empty((*x.shape[:-1], x.shape[-1] - half))


class _Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.weight)


def beyond_last(dims: Any, args: Any) -> mz.BatchDims | None:
    """`center` where it does not hold the batch in the dimension that it averages over."""
    at, over = dims["x"], args["dim"] % len(args["x"])
    return None if at in (None, over) else mz.BatchDims((at,), at)


ONES = torch.ones(4)
ROWS = [(random(3, 4, seed=1), ONES), (random(3, 4, seed=2), ONES)]
CASES: dict[str, tuple[Any, Any, list[tuple[Any, ...]], Callable[[Tensor], Tensor]]] = {
    "element-wise": (squash, "pointwise", [(row[0],) for row in ROWS], squash),
    "dimensions": (rms, mz.BatchDims((0, None), 0), ROWS, _Rms()),
    "function": (center, beyond_last, [(row[0], -1) for row in ROWS], lambda x: center(x, -1)),
    "two results": (halves, mz.BatchDims((0,), (0, 0)), [(r[0],) for r in ROWS], lambda x: torch.cat(halves(x), -1)),
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = dict(RULES)
    yield
    for op, *_ in CASES.values():
        if op._opoverload in RULES:
            mz.unregister_batching_rule(op)
    assert before == RULES


@pytest.mark.parametrize("name", CASES)
def test_refused_then_registered(name: str) -> None:
    op, rule, examples, body = CASES[name]
    model = seeded(Tiny(body))
    with pytest.raises(mz.UnsupportedOp, match=f"{op._opoverload} is not in the rule table.*mz.register_batching_rule"):
        mz.transform(model, rows(), loss=F.cross_entropy)
    mz.register_batching_rule(op, rule, examples=examples)
    program = mz.transform(model, rows(), loss=F.cross_entropy, estimator=mz.TwoSided(2))
    mz.verify(program, model, rows())
    assert str(op._opoverload).removesuffix(".default") in str(program)


def test_a_call_that_a_function_refuses() -> None:
    mz.register_batching_rule(center, beyond_last, examples=[(row[0], -1) for row in ROWS])
    with pytest.raises(mz.BatchCoupled, match="its batching rule does not take the batch in dimension 0 of 'x'"):
        mz.transform(seeded(Tiny(lambda x: center(x, 0))), rows(), loss=F.cross_entropy)


@pytest.mark.parametrize(
    ("op", "rule", "examples", "message"),
    [
        (center, "pointwise", [(row[0], 0) for row in ROWS], "center.default is wrong: with the batch in dimension"),
        (center, mz.BatchDims((0,), 0), [(r[0], 0) for r in ROWS], "dimension 0 of 'x', result 0 of example 0 is not"),
        (rms, mz.BatchDims((1, 0), 1), [(x, x[0]) for x, _ in ROWS], "rms.default is wrong.*is not what it is alone"),
        (rms, mz.BatchDims((0, None), 1), ROWS, "takes none of the examples.* batch of 3 into dimension 1 of result 0"),
        (rms, mz.BatchDims((0,), 0), ROWS, "has 1 inputs, expected 2, one for each of x, weight"),
        (halves, mz.BatchDims((0,), 0), [(r[0],) for r in ROWS], "has 1 outputs, the operator has 2"),
        (rms, mz.BatchDims((2, None), 0), ROWS, "'x' has no dimension 2"),
        (squash, lambda dims, args: None, [(r[0],) for r in ROWS], "takes none of the examples.*does not take"),
        (squash, lambda dims, args: 0, [(r[0],) for r in ROWS], "gave 0, expected a BatchDims or None"),
    ],
)
def test_a_wrong_rule(op: Any, rule: Any, examples: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(mz.BatchingRuleError, match=message):
        mz.register_batching_rule(op, rule, examples=examples)


@pytest.mark.parametrize(
    ("op", "rule", "examples", "message"),
    [
        (squash, "elementwise", [(r[0],) for r in ROWS], "a rule is 'pointwise', a BatchDims or a function, found"),
        (squash, "pointwise", [(ROWS[0][0],)], "needs at least two examples"),
        (squash, "pointwise", [(ROWS[0][0],)] * 2, "have equal x: give different values"),
        (squash, "pointwise", [(r[0], i) for i, r in enumerate(ROWS)], "differ in more than the values.*see 'scale'"),
        (torch.ops.aten.linear.default, "pointwise", [], "has a batching rule already"),
        (torch.ops.aten.add_.Tensor, "pointwise", [], "changes an argument in place"),
        (torch.ops.aten.add, "pointwise", [], "has the overloads .*: name one"),
        (torch.ops.aten.block_diag.default, "pointwise", [], "takes a list of tensors, 'tensors'"),
        (len, "pointwise", [], "expected an operator"),
    ],
)
def test_what_cannot_be_registered(op: Any, rule: Any, examples: list[tuple[Any, ...]], message: str) -> None:
    with pytest.raises(mz.InputError, match=message):
        mz.register_batching_rule(op, rule, examples=examples)


def test_built_in_rules_stay() -> None:
    with pytest.raises(mz.InputError, match=r"no batching rule was registered for aten\.linear"):
        mz.unregister_batching_rule(torch.ops.aten.linear.default)


def test_rules_are_tried_without_registering_them():
    over_last = [(x, -1) for x, _ in ROWS]
    check_rule(center, beyond_last, examples=over_last)
    assert center._opoverload not in RULES
    with pytest.raises(mz.BatchingRuleError, match="is wrong"):
        check_rule(center, mz.BatchDims((0,), 0), examples=[(x, 0) for x, _ in ROWS])
    with pytest.raises(mz.InputError, match="has no batching rule"):
        check_rule(center, examples=over_last)


def test_the_compilers_own_rules_can_be_tried():
    softmax = torch.ops.aten.softmax.int
    own = RULES[softmax]
    check_rule(softmax, examples=[(x, 1) for x, _ in ROWS])
    with pytest.raises(mz.BatchingRuleError, match="is wrong"):
        check_rule(softmax, "pointwise", examples=[(x, 1) for x, _ in ROWS])
    assert RULES[softmax] is own
