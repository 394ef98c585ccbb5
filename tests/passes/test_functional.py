"""A graph is traced anew only if something in it would change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import ExportedProgram

from mobizo_passes.capture.functional import DIALECT, functional

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(3, 5)

    def forward(self, x):
        return self.function(self.inner(x))


STAY = {
    "linear": torch.sin,
    "layer norm": lambda y: F.layer_norm(y, [5]),
    "matmul": lambda y: torch.matmul(y, y.transpose(0, 1)),
    "several results": lambda y: torch.add(*y.max(1)),
    "softmax": lambda y: F.cross_entropy(y, y.argmax(1)),
}
CHANGE = {
    "in place": lambda y: y.sin().add_(1.0),
    "reshape": lambda y: y.reshape(2, 10).exp(),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "dead": lambda y: (y.sin(), y.cos())[1],
    "batch norm": lambda y: F.batch_norm(y, torch.zeros(5), torch.ones(5)),
    "no-op cast": lambda y: y.to(torch.float32).exp(),
}


def exported(function) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(Calls(function).requires_grad_(False).eval(), (X,))


def lines(program: ExportedProgram) -> list[str]:
    return [f"{node.name} {node.target} {node.args} {node.kwargs}" for node in program.graph.nodes]


@pytest.mark.parametrize("name", STAY)
def test_what_would_not_change_is_given_back(name: str):
    """If this fails with a new torch: `run_decompositions({})` takes something apart that `_stays` does not know."""
    program = exported(STAY[name])
    found, verifier = functional(program)
    assert found is program
    again = program.run_decompositions({})
    assert lines(found) == lines(again)
    assert verifier is again.verifier
    assert verifier.dialect == DIALECT


@pytest.mark.parametrize("name", CHANGE)
def test_what_would_change_is_traced(name: str):
    program = exported(CHANGE[name])
    found, verifier = functional(program)
    assert lines(found) == lines(program.run_decompositions({})) != lines(program)
    assert verifier is found.verifier
    torch.testing.assert_close(found.module()(X), program.module()(X), rtol=0, atol=0)
