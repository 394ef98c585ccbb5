"""Dialects: a violation is found, and named by place, node and rule; what the compiler makes is of its dialect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

import mobizo_passes as mz
from mobizo_passes.dialects import CAPTURED, CORE, READABLE
from mobizo_passes.errors import ContractError
from mobizo_passes.graph.dialect import Dialect
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, run_passes
from tests.passes.contract import Tiny, parsed, rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Plant(Pass):
    """Puts an operator of the compiler's own before the output."""

    name: ClassVar[str] = "plant"

    def rewrite(self, ir: Ir) -> int:
        (x,) = ir.placeholders("batch")
        with ir.before(ir.graph.output_node()):
            ir.set_outputs([(ir.outputs[0], ir.call(torch.ops.mobizo.expand.default, x, 2, 0, 1))])
        return 1


def test_a_violation_is_named_by_pass_node_and_rule():
    ir = parsed("%x: f32[4, 3] = batch 'x'\n%y: f32[4, 3] = aten.relu(%x)\nreturn %y: f32[4, 3] = logits")
    with pytest.raises(ContractError, match="after plant: expected no operator of our own") as error:
        run_passes(ir, (Plant(),), dialect=CAPTURED)
    assert (error.value.where, error.value.expected) == ("after plant", "no operator of our own")
    assert error.value.node is ir.output_node("logits")
    assert "(dialect 'captured'), found mobizo.expand.default\n  at %expand = mobizo.expand" in str(error.value)


@pytest.mark.parametrize(
    ("dialect", "text", "rule", "found"),
    [
        (CAPTURED, "%x: f32[2] = adapter 'x'\nreturn %x: f32[2] = logits", "inputs that are batch", "adapter"),
        (
            CORE,
            "%x: f32[4] = batch 'x'\n%y: f32[2, 2] = aten.view(%x, [2, 2])\nreturn %y: f32[2, 2] = logits",
            "reshapes instead of views",
            "aten.view.default",
        ),
        (
            CORE,
            "%x: f32[4] = batch 'x'\n%y: f32[4] = aten.rand_like(%x)\nreturn %y: f32[4] = logits",
            "no random numbers",
            "aten.rand_like.default",
        ),
        (
            READABLE,
            "%x: f32[4, 3] = batch 'x'\n%y: f32[8, 3] = mobizo.expand(%x, 2, 0, 1)\n"
            "%z: f32[2] = mobizo.reduce_loss(%y, None, 2, 0, 3, 'sum')\nreturn %z: f32[2] = losses",
            "groups and parts that divide the fused dimension",
            "8 in dimension 0 for 6",
        ),
        (
            READABLE,
            "%s: i64[2] = seed\n%z: f32[2, 4] = mobizo.noise(%s, 1, 2, [4], 'gaussian')\nreturn %z: f32[2, 4] = logits",
            "a seed",
            "a seed torch.int64[2]",
        ),
        (
            READABLE,
            "%v: f32[4, 3] = adapter 'v'\n%z: f32[2, 1, 3] = batch 'z'\n%e: f32[1] = eps\n"
            "%y: f32[4, 4, 3] = mobizo.perturb(%v, %z, %e, 'two_sided')\nreturn %y: f32[4, 4, 3] = logits",
            "noise of the tensor's own shape",
            "noise [2, 1, 3] for a tensor [4, 3]",
        ),
    ],
)
def test_a_planted_violation_of_each_kind_is_found(dialect: Dialect, text: str, rule: str, found: str):
    with pytest.raises(ContractError) as error:
        dialect.check(parsed(text), "here")
    assert str(error.value).startswith(f"here: expected {rule}")
    assert f"found {found}\n" in str(error.value)


def test_a_value_that_is_not_what_the_operator_gives_is_found():
    ir = parsed("%x: f32[4, 3] = batch 'x'\n%y: f32[4, 3] = aten.relu(%x)\nreturn %y: f32[4, 3] = logits")
    CORE.check(ir, "here", values=True)
    y = ir.output_node("logits")
    y.target, y.args = aten.permute.default, (y.args[0], [1, 0])
    with pytest.raises(ContractError, match=r"here: expected the value that its operator gives, f32\[3, 4\]"):
        CORE.check(ir, "here", values=True)


def test_what_the_compiler_makes_is_of_its_dialects():
    program = mz.transform(Tiny(layers=2), rows(), loss=F.cross_entropy)
    for method in program.methods:
        READABLE.check(program._ir(method), method, values=True)
        CORE.check(program.core_ir(method), method, values=True)
    CORE.check(program.core_ir("step", "internal"), "internal", values=True)


def test_graphs_are_checked_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch):
    text = "%x: f32[4, 3] = batch 'x'\n%y: f32[4, 3] = aten.relu(%x)\nreturn %y: f32[4, 3] = logits"
    monkeypatch.setenv("MOBIZO_CHECK", "0")
    run_passes(parsed(text), (Plant(),), dialect=CAPTURED)
    monkeypatch.setenv("MOBIZO_CHECK", "1")
    with pytest.raises(ContractError):
        run_passes(parsed(text), (Plant(),), dialect=CAPTURED)
