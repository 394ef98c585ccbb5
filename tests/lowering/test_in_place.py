"""ExecuTorch's passes that change single calls give the same graphs in place as by tracing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from executorch.exir.passes import OpReplacePass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from torch.fx import GraphModule

from lowering.executorch_compat.in_place import _scalars_to_tensors, code_on_demand, rewriting_in_place
from tests.lowering.passkit import Fn, export
from tests.lowering.test_idle_passes import text

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {
    "no numbers": lambda m, x: torch.relu(x).sum(1),
    "the same number twice": lambda m, x: (x * 2.0 + x.exp() * 2.0) / 3,
    "integers": lambda m, x: torch.bitwise_and(x.argmax(1), 3) + 1,
    "number first": lambda m, x: torch.rsub(x, 1.0),
    "a number of a wider type": lambda m, x: x.argmax().to(torch.int32) + 1,
    "where": lambda m, x: torch.where(x > 0, x, 0.0),
}


def graph_of(name: str) -> GraphModule:
    return export(Fn(FUNCTIONS[name]), (X,)).graph_module


def after(one: Any, module: GraphModule) -> GraphModule:
    """The graph after a pass."""
    return one(module).graph_module


def values(module: GraphModule) -> list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    found = [node.meta.get("val") for node in module.graph.nodes if node.op == "call_function"]
    return [(v.dtype, tuple(v.shape), v.stride()) for v in found if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_edge_operators_in_place(name: str):
    """If this fails with a new ExecuTorch: OpReplacePass does more than name operators. Leave it unpatched."""
    tensors = after(ScalarToTensorPass(), graph_of(name))
    traced = after(OpReplacePass(), copy.deepcopy(tensors))
    with rewriting_in_place():
        replaced = after(OpReplacePass(), tensors)
    assert replaced is tensors
    assert [str(n.target) for n in replaced.graph.nodes if n.op == "call_function"] == [
        str(n.target) for n in traced.graph.nodes if n.op == "call_function"
    ]
    assert values(replaced) == values(traced)
    assert all("from_node" in n.meta for n in replaced.graph.nodes if n.op not in ("placeholder", "output"))
    torch.testing.assert_close(replaced(X), traced(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_become_tensors_in_place(name: str):
    """If this fails with a new ExecuTorch: ScalarToTensorPass coerces other arguments. Leave it unpatched."""
    traced = after(ScalarToTensorPass(), graph_of(name))
    with rewriting_in_place():
        replaced = after(ScalarToTensorPass(), graph_of(name))
    assert values(replaced) == values(traced)
    numbers = [[float(getattr(m, n.target)) for n in m.graph.nodes if n.op == "get_attr"] for m in (replaced, traced)]
    assert numbers[0] == numbers[1]
    torch.testing.assert_close(replaced(X), traced(X), rtol=0, atol=0)


def test_a_number_that_would_change_a_type_is_left_to_the_trace():
    module = graph_of("a number of a wider type")
    before = text(module)
    assert not _scalars_to_tensors(module)
    assert text(module) == before


def test_code_is_generated_at_the_first_call():
    with code_on_demand():
        module = graph_of("integers")
        module.graph.eliminate_dead_code()
        module.recompile()
        assert "first call" in str(module)
    assert torch.equal(module(X)[0], torch.bitwise_and(X.argmax(1), 3) + 1)
    assert "bitwise_and" in module.code
    before = GraphModule.recompile
    with pytest.raises(ZeroDivisionError), code_on_demand():
        raise ZeroDivisionError
    assert GraphModule.recompile is before
