"""A graph is traced anew only if it writes in place; composites are decomposed one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram

from mobizo_passes.capture.functional import DIALECT, decompose_composites, functional, is_composite
from mobizo_passes.graph.ir import Ir

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(3, 5)

    def forward(self, x):
        return self.function(self.inner(x))


def without_autocast(y):
    with torch.autocast("cpu", enabled=False):
        return y.exp()


STAY = {
    "linear": torch.sin,
    "layer norm": lambda y: F.layer_norm(y, [5]),
    "matmul": lambda y: torch.matmul(y, y.transpose(0, 1)),
    "several results": lambda y: torch.add(*y.max(1)),
    "softmax": lambda y: F.cross_entropy(y, y.argmax(1)),
}
COMPOSITES = {
    "reshape": lambda y: y.reshape(2, 10).exp(),
    "reshape with a copy": lambda y: y.t().reshape(2, 10).exp(),
    "flatten": lambda y: y.flatten().exp(),
    "no-op cast": lambda y: y.to(torch.float32).exp(),
    "cast": lambda y: y.to(torch.float64).exp(),
    "contiguous": lambda y: y.t().contiguous().exp(),
    "transposed": lambda y: y.T.exp(),
    "chunks": lambda y: torch.add(*y.reshape(2, 10).chunk(2, 1)),
    "twice": lambda y: y.reshape(2, 10).exp() + y.cos().reshape(2, 10),
    "dead": lambda y: (y.sin(), y.cos())[1],
    "to another's dtype": lambda y: y.type_as(y.double()).exp(),
}
WRITES = {
    "in place": lambda y: y.sin().add_(1.0),
    "batch norm": lambda y: F.batch_norm(y, torch.zeros(5), torch.ones(5)),
    "vmap": lambda y: torch.vmap(lambda row: row * row.sum())(y),
    "under autocast": lambda y: without_autocast(y.sin()),
    "a literal tensor": lambda y: y + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
}


def exported(function) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Calls(function).requires_grad_(False).eval(), (X,))


def lines(program: ExportedProgram) -> list[str]:
    return [f"{node.name} {node.target} {node.args} {node.kwargs}" for node in program.graph.nodes]


def calls(graph: torch.fx.Graph) -> list[str]:
    """Operators and arguments of the calls that something reads, in order, without the names of nodes."""
    used = [node for node in graph.nodes if node.op == "call_function" and node.users]
    number = {node: f"%{place}" for place, node in enumerate(used)}
    shown = [
        (node.target, torch.fx.map_arg((node.args, node.kwargs), lambda n: number.get(n, n.name))) for node in used
    ]
    return [f"{target} {args}" for target, args in shown]


def decomposed(program: ExportedProgram) -> Ir:
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    fake = detect_fake_mode([node.meta["val"] for node in program.graph.nodes if "val" in node.meta])
    assert fake is not None
    ir = Ir(graph, {}, (), fake)
    decompose_composites(ir)
    return ir


@pytest.mark.parametrize("name", STAY)
def test_what_would_not_change_is_given_back(name: str):
    """If this fails with a new torch: `run_decompositions({})` takes something apart unknown to `is_composite`."""
    program = exported(STAY[name])
    found, verifier = functional(program)
    assert found is program
    again = program.run_decompositions({})
    assert lines(found) == lines(again)
    assert verifier is again.verifier
    assert verifier.dialect == DIALECT
    assert not any(is_composite(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", WRITES)
def test_what_writes_is_traced(name: str):
    program = exported(WRITES[name])
    found, verifier = functional(program)
    assert lines(found) == lines(program.run_decompositions({})) != lines(program)
    assert verifier is found.verifier
    torch.testing.assert_close(found.module()(X), program.module()(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_are_decomposed_as_tracing_decomposes_them(name: str):
    """If this fails with a new torch: the operator belongs among those that only tracing takes apart right."""
    program = exported(COMPOSITES[name])
    assert functional(program)[0] is program
    ir = decomposed(program)
    assert calls(ir.graph) == calls(program.run_decompositions({}).graph)
    assert not any(is_composite(node.target) and node.users for node in ir.graph.nodes)


def test_dropout_that_is_off_leaves_nothing():
    """Tracing leaves a copy, which canonicalization would remove."""
    ir = decomposed(exported(lambda y: F.dropout(y, 0.5, training=False).exp()))
    assert [node.target for node in ir.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default,
        torch.ops.aten.exp.default,
    ]
