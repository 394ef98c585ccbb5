"""Contracts of passes are executed: what a pass requires is checked before it, what it ensures after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mobizo_passes.errors import ContractError
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.passes import FUNCTIONAL, NodePass, Pass, PassRecord, absent, has_output, run_passes

aten = torch.ops.aten


def relu_of_x() -> Ir:
    graph = fx.Graph()
    graph.output(())
    ir = Ir(graph, {}, (), FakeTensorMode())
    x = ir.add_input("batch", "x", torch.empty(2, 3))
    with ir.before(ir.graph.output_node()):
        ir.set_outputs([(Output("logits", "logits"), ir.call(aten.relu.default, x))])
    return ir


@dataclass(frozen=True)
class ReluToTanh(NodePass):
    name: ClassVar[str] = "relu-to-tanh"
    operators = (aten.relu.default,)
    requires = (FUNCTIONAL,)
    ensures = (absent(aten.relu.default),)

    def replacement(self, ir: Ir, node: fx.Node) -> fx.Node | None:
        return ir.call(aten.tanh.default, node.args[0])


@dataclass(frozen=True)
class Forgetful(ReluToTanh):
    """Promises what it does not do."""

    name: ClassVar[str] = "forgetful"

    def replacement(self, ir: Ir, node: fx.Node) -> fx.Node | None:
        return None


@dataclass(frozen=True)
class NeedsLosses(Pass):
    name: ClassVar[str] = "needs-losses"
    requires = (has_output("losses"),)

    def rewrite(self, ir: Ir) -> int:
        raise AssertionError("a pass must not run on what it does not take")


def test_a_pass_that_keeps_its_contract_is_recorded():
    history: list[PassRecord] = []
    ir = run_passes(relu_of_x(), (ReluToTanh(),), history)
    assert [n.target for n in ir.graph.nodes if n.op == "call_function"] == [aten.tanh.default]
    assert [(each.name, each.rewrites) for each in history] == [("relu-to-tanh", 1)]
    assert "aten.relu" in history[0].before
    assert "aten.tanh" in history[0].after


def test_what_a_pass_requires_is_checked_before_it():
    ir = relu_of_x()
    with pytest.raises(ContractError, match="before needs-losses: expected an output that is losses, found"):
        NeedsLosses()(ir)


def test_what_a_pass_requires_names_the_node():
    ir = relu_of_x()
    with ir.before(ir.graph.output_node()):
        wrong = ir.graph.call_function(aten.relu_.default, (ir.placeholders()[0],))
    with pytest.raises(ContractError, match="expected a functional graph, found an operator that writes") as error:
        ReluToTanh()(ir)
    assert (error.value.where, error.value.node) == ("before relu-to-tanh", wrong)
    assert f"%{wrong.name} = aten.relu_.default" in str(error.value)


def test_a_broken_promise_is_found_where_graphs_are_checked(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ContractError, match=r"after forgetful: expected no relu.default, found aten.relu.default"):
        Forgetful()(relu_of_x())
    monkeypatch.delenv("MOBIZO_CHECK")
    assert Forgetful()(relu_of_x()) == 0
