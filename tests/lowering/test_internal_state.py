"""State inside a lowered program: what would silently not train is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

import lowering
import mobizo_passes as mz
from lowering import stages
from lowering.checks import check_state
from lowering.errors import StateLost
from lowering.executorch_compat.programs import rewritten
from lowering.targets.xnnpack.pipeline import PASSES
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir
from tests.models import case
from tests.passes.contract import Tiny, rows

STATE = ["b"]


class Held(nn.Module):
    """x·(W + bᵀ) with b held inside, and written if `writes`."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.weight, self.b = nn.Buffer(torch.ones(8, 8)), nn.Buffer(torch.full((8, 8), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.b) + F.linear(x, self.weight)
        if self.writes:
            self.b.copy_(self.b - y.mean())
        return y


def exported(writes: bool) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Held(writes), (torch.ones(1, 4, 8),)).run_decompositions({})


def partitioned(program: ExportedProgram, partitioner: Any = None) -> ExportedProgram:
    from lowering.targets import get_target

    target = get_target("xnnpack")
    edge = stages._to_edge({"step": program}, target, {"step": partitioner or target.partitioner("step")}, {})
    return edge.exported_program("step")


def test_a_buffer_inside_the_delegate_is_refused() -> None:
    """What ExecuTorch does by itself: XNNPACK's partitioner takes a linear's weight, written or not, for a constant."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    program = exported(writes=True)
    with pytest.raises(
        StateLost, match=r"method 'step': the adapter tensor 'b' .* taken into a delegate, as a constant"
    ):
        check_state("step", program, partitioned(program, XnnpackPartitioner()), STATE)


def test_our_partitioner_leaves_a_written_buffer_outside() -> None:
    program = exported(writes=True)
    check_state("step", program, partitioned(program), STATE)


def test_a_legalized_program_keeps_its_buffer_outside() -> None:
    program = exported(writes=True)
    legal, _ = rewritten(program, PASSES["fp32"])
    after = partitioned(legal)
    assert any("executorch_call_delegate" in str(node.target) for node in after.graph.nodes)
    check_state("step", program, after, STATE)


def test_a_buffer_that_is_not_written_is_refused() -> None:
    program = exported(writes=False)
    with pytest.raises(StateLost, match=r"'b' inside the program is no longer written"):
        check_state("step", program, program, STATE)


def test_a_buffer_whose_value_was_folded_is_refused() -> None:
    before, after = exported(writes=True), exported(writes=True)
    signature = after.graph_signature
    name = next(name for name, fqn in signature.inputs_to_buffers.items() if fqn == "b")
    node = next(n for n in after.graph.nodes if n.name == name)
    other = next(n for n in after.graph.nodes if signature.inputs_to_buffers.get(n.name) == "weight")
    forward = next(iter(node.users))
    forward.replace_input_with(node, other)
    with pytest.raises(StateLost, match=r"'b' inside the program is no longer read for output 0"):
        check_state("step", before, after, STATE)


def test_passes_do_not_take_a_written_buffer_for_a_constant() -> None:
    for writes in (True, False):
        ir = Ir.from_exported_program(exported(writes))
        found = {role(n).name: ir.is_constant(n) for n in ir.placeholders()}
        assert found["weight"]
        assert found["b"] is not writes
        kept = ir.to_exported_program().graph_signature.buffers_to_mutate.values()
        assert list(kept) == (["b"] if writes else [])


def test_a_program_without_initial_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch's own behavior without its pass: the buffer's shape is stored, not its content."""
    program = mz.transform(Tiny(), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1))
    monkeypatch.setattr(stages, "initial_value_passes", lambda edge: [])
    with pytest.raises(StateLost, match=r"no stored initial value: 0 have one"):
        lowering.lower(program, target="portable", adapter="internal")


def test_state_that_the_manifest_does_not_promise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = mz.transform(Tiny(), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1))
    core = program.core
    monkeypatch.setattr(program, "core", lambda name, adapter: core(name, "internal"))
    with pytest.raises(lowering.InvalidProgram, match=r"method 'step': the manifest lists"):
        lowering.lower(program, target="portable")


def test_an_unknown_form_is_refused() -> None:
    one = case("mlp")
    program = mz.transform(one.build(), one.inputs(), loss=F.cross_entropy)
    with pytest.raises(lowering.UnknownAdapterForm, match="adapter='inside' is unknown: expected 'external'"):
        lowering.lower(program, adapter="inside")
