"""ExecuTorch's passes are left out where they would change nothing, and only there."""

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from lowering.executorch_compat.idle_passes import _PASSES, rewrites_nothing, without_idle_passes
from tests.lowering.passkit import Fn, export

CLASSES = {name: getattr(importlib.import_module(module), name) for module, name in _PASSES}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

# Functions of x [3, 4], with the passes that have something to rewrite in them.
FUNCTIONS = {
    "nothing": (lambda m, x: torch.relu(F.linear(x, m.w)).sum(1), set()),
    "a scalar for a tensor": (lambda m, x: x * 2.0, {"ScalarToTensorPass"}),
    "two types": (lambda m, x: x * x.argmax(1, keepdim=True), {"RemoveMixedTypeOperators"}),
    "a view": (
        lambda m, x: x.unsqueeze(0).exp(),
        {"ReplaceViewOpsWithViewCopyOpsPass", "ReplaceBrokenOpsWithFunctionalOpsPass"},
    ),
    "a transposition": (
        lambda m, x: torch.ops.aten.t.default(x).exp(),
        {"NormalizeTransposePass", "ReplaceViewOpsWithViewCopyOpsPass", "ReplaceBrokenOpsWithFunctionalOpsPass"},
    ),
}


@functools.cache
def exported(name: str) -> GraphModule:
    return export(Fn(FUNCTIONS[name][0], w=torch.randn(5, 4)), (X,)).graph_module


def graph_of(name: str) -> GraphModule:
    return copy.deepcopy(exported(name))


def text(module: GraphModule) -> list[str]:
    number = {node: place for place, node in enumerate(module.graph.nodes)}
    calls = [node for node in module.graph.nodes if node.op != "placeholder"]
    return [f"{node.target} {[number[each] for each in node.all_input_nodes]} {node.kwargs}" for node in calls]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pass_is_idle_exactly_where_it_rewrites_nothing(name: str):
    """If this fails with a new ExecuTorch: a pass does more than rewrite calls. Take it out of `_PASSES`."""
    tried = set(CLASSES)
    if "ScalarToTensorPass" in FUNCTIONS[name][1]:
        tried.remove("RemoveMixedTypeOperators")  # It expects scalars to be tensors already.
    found = {which for which in tried if not rewrites_nothing(CLASSES[which](), graph_of(name))}
    assert found == FUNCTIONS[name][1]
    for which in tried - found:
        module = graph_of(name)
        assert text(CLASSES[which]()(module).graph_module) == text(module)


def test_an_idle_pass_gives_the_graph_back_and_another_rewrites_it():
    idle, busy = graph_of("nothing"), graph_of("a scalar for a tensor")
    each: Any = CLASSES["ScalarToTensorPass"]()
    with without_idle_passes():
        assert each(idle).graph_module is idle
        assert text(each(busy).graph_module) != text(busy)
    assert each(idle).graph_module is not idle


def test_the_passes_are_as_before_afterwards():
    before = {which: each.call for which, each in CLASSES.items()}
    with pytest.raises(ZeroDivisionError), without_idle_passes():
        raise ZeroDivisionError
    assert {which: each.call for which, each in CLASSES.items()} == before
