"""ExecuTorch's passes that change single calls give the same graphs in place as by tracing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from executorch.exir import memory_planning, tensor
from executorch.exir.passes import OpReplacePass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.spec_prop_pass import SpecPropPass
from torch._export import utils
from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import ReplaceViewOpsWithViewCopyOpsPass
from torch.export.decomp_utils import CustomDecompTable
from torch.fx import GraphModule

from lowering.executorch_compat.in_place import (
    _scalars_to_tensors,
    code_on_demand,
    rewriting_in_place,
    values_as_they_are,
)
from lowering.executorch_compat.memoized import memoized
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


VIEWS = {
    "a view of a transposed tensor": lambda m, x: torch.ops.aten.t.default(x).unsqueeze(0).exp().sum(2),
    "an expanded row": lambda m, x: x[:1].expand(3, 4) * x,
    "a slice": lambda m, x: torch.relu(x)[:, 1:3].t() + 1.0,
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_become_copies_in_place(name: str):
    """If this fails with a new torch: its pass does more than name operators. Leave it unpatched."""
    given = export(Fn(VIEWS[name]), (X,)).graph_module
    traced = after(ReplaceViewOpsWithViewCopyOpsPass(), copy.deepcopy(given))
    with rewriting_in_place():
        replaced = after(ReplaceViewOpsWithViewCopyOpsPass(), given)
    assert replaced is given
    assert text(replaced) == text(traced)
    assert values(replaced) == values(traced)
    torch.testing.assert_close(replaced(X), traced(X), rtol=0, atol=0)


def test_specs_are_made_of_the_values_at_hand():
    """If this fails with a new ExecuTorch: it wants more of a retrace than values. Let it retrace."""
    with rewriting_in_place():
        module = after(OpReplacePass(), after(ReplaceViewOpsWithViewCopyOpsPass(), graph_of("no numbers")))
    traced = after(SpecPropPass(), copy.deepcopy(module))
    with values_as_they_are():
        given = after(SpecPropPass(), module)
    assert given is module
    specs = [
        [str(node.meta["spec"]) for node in graph.nodes if node.op != "output"] for graph in (given.graph, traced.graph)
    ]
    assert specs[0] == specs[1]
    assert values(given) == values(traced)
    for each, other in zip(given.graph.nodes, traced.graph.nodes, strict=True):
        if each.op == "call_function":
            assert each.meta["tensor_meta"] == other.meta["tensor_meta"]
    del next(node for node in module.graph.nodes if node.op == "call_function").meta["val"]
    with values_as_they_are():
        assert after(SpecPropPass(), module) is not module


def test_what_is_computed_once_is_the_same():
    """If this fails with a new ExecuTorch or torch: a function has moved. Leave `memoized` out."""
    strides: Any = ((), (1,), (4, 1), (1, 4), (5, 1, 15), (4, 3, 1, 1), (3, 1, 3, 3))
    before = [tensor.dim_order_from_stride(each) for each in strides]
    operators = set(CustomDecompTable())
    listing = utils._materialize_cpp_cia_ops

    class Counter(torch.nn.Module):
        step: torch.Tensor
        size: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros(1))
            self.register_buffer("size", torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.step.add_(1)
            return x.mul(self.size)

    programs = [
        torch.export.export(each, (torch.ones(1),)).run_decompositions() for each in (Counter(), torch.nn.Linear(1, 1))
    ]

    def mutable() -> list[bool]:
        return [memory_planning._is_mutable_buffer(n, p.graph_signature) for p in programs for n in p.graph.nodes]

    written = mutable()
    assert sum(written) == 1
    with memoized():
        assert mutable() == written
        assert [tensor.dim_order_from_stride(each) for each in strides] == before
        assert set(CustomDecompTable()) == operators
        assert utils._materialize_cpp_cia_ops is not listing
    assert utils._materialize_cpp_cia_ops is listing
