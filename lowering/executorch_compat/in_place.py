"""Spare ExecuTorch's retraces of whole graphs where a change of single nodes, or none, does the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from executorch.exir.passes import OpReplacePass, spec_prop_pass
from executorch.exir.passes.replace_aten_with_edge_pass import aten_to_edge, should_lower_to_edge
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from torch._export.passes.replace_view_ops_with_view_copy_ops_pass import (
    ReplaceViewOpsWithViewCopyOpsPass,
    get_view_copy_of_view_op,
)
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils import _pytree as pytree

from lowering.executorch_compat.patching import patched
from mobizo_passes.graph.infer import infer


@contextmanager
def rewriting_in_place() -> Iterator[None]:
    """Within, operators become those of the edge dialect, numbers tensors, views copies, without a trace of the graph.

    Each of ExecuTorch's passes would otherwise interpret every node on fake tensors, a millisecond each.
    """
    with ExitStack() as stack:
        views = ReplaceViewOpsWithViewCopyOpsPass
        stack.enter_context(patched(views, "call", _views_in_place(views.call)))
        stack.enter_context(patched(OpReplacePass, "call", _operators_in_place(OpReplacePass.call)))
        stack.enter_context(patched(ScalarToTensorPass, "call", _scalars_first(ScalarToTensorPass.call)))
        yield


@contextmanager
def values_as_they_are() -> Iterator[None]:
    """Within, ExecuTorch makes tensor specs from the values that nodes have, and doesn't compute them all again."""

    def given(graph_module: GraphModule) -> PassResult | None:
        nodes = [node for node in graph_module.graph.nodes if node.op != "output"]
        if _holds_graphs(graph_module) or any("val" not in node.meta for node in nodes if node.op != "get_attr"):
            return retrace()(graph_module)
        for node in nodes:
            if "val" in node.meta:
                # As a retrace leaves it: nothing, where the value is a fake tensor.
                node.meta["tensor_meta"] = pytree.tree_map(lambda _: None, node.meta["val"])
        return PassResult(graph_module, False)

    retrace = spec_prop_pass.ExportPass
    with patched(spec_prop_pass, "ExportPass", lambda: given):
        yield


@contextmanager
def code_on_demand() -> Iterator[None]:
    """Within, Python code of a graph module is generated at its first call, not after each of some sixty passes."""
    real = GraphModule.recompile

    def recompile(self: GraphModule) -> Any:
        if isinstance(self, _LazyGraphModule) or _is_flattened(self):
            return real(self)
        kind: Any = type(self)

        def forward(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
            real(module)
            return module.forward(*args, **kwargs)

        kind.forward = forward
        # ExecuTorch formats whole modules for log lines that nobody reads.
        self._code = "(generated at the first call)"
        return None

    with patched(GraphModule, "recompile", recompile):
        yield


def _is_flattened(module: GraphModule) -> bool:
    """Whether its inputs are unflattened first: then its signature is read, not only called."""
    return isinstance(module.graph._codegen, _PyTreeCodeGen)


def _operators_in_place(call: Any) -> Any:
    def called(self: Any, graph_module: GraphModule) -> PassResult:
        if _holds_graphs(graph_module):
            return call(self, graph_module)
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and should_lower_to_edge(node.target):
                node.target = aten_to_edge(node.target)
            if node.op not in ("placeholder", "output"):
                # A trace says where each node is from, and debug handles are made of that.
                node.meta.setdefault("from_node", [NodeSource(node, "OpReplacePass", NodeSourceAction.REPLACE)])
        return PassResult(graph_module, True)

    return called


def _views_in_place(call: Any) -> Any:
    def called(self: Any, graph_module: GraphModule) -> PassResult:
        if _holds_graphs(graph_module):
            return call(self, graph_module)
        moved: set[Node] = set()
        changed = False
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            copy = _copy_of_view(node.target)
            if copy is not None:
                node.target, changed = copy, True
            # A copy is contiguous where the view was not, and what is computed from it may be too.
            if (copy is not None or not moved.isdisjoint(node.all_input_nodes)) and _inferred_anew(node):
                moved.add(node)
        return PassResult(graph_module, changed)

    return called


def _copy_of_view(target: torch._ops.OpOverload) -> Any:
    if target is torch.ops.aten._unsafe_view.default:
        return torch.ops.aten.view_copy.default
    return get_view_copy_of_view_op(target._schema)


def _inferred_anew(node: Node) -> bool:
    """Compute the node's value on fake tensors; whether its layout is another than before."""
    former = node.meta["val"]
    mode = next(each.fake_mode for each in pytree.tree_leaves(former) if isinstance(each, FakeTensor))
    node.meta["val"] = infer(mode, node.target, node.args, dict(node.kwargs))
    return _layout(former) != _layout(node.meta["val"])


def _layout(value: Any) -> list[Any]:
    return [each.stride() if isinstance(each, torch.Tensor) else each for each in pytree.tree_leaves(value)]


def _scalars_first(call: Any) -> Any:
    """`call` after the numbers that stand for tensors have become constants, where that changes no value."""

    def called(self: Any, graph_module: GraphModule) -> PassResult:
        changed = not _holds_graphs(graph_module) and _scalars_to_tensors(graph_module)
        result = call(self, graph_module)
        return PassResult(result.graph_module, result.modified or changed)

    return called


def _scalars_to_tensors(graph_module: GraphModule) -> bool:
    changed = False
    constants: dict[Any, str] = {}
    for node in list(graph_module.graph.nodes):
        places = _numbers_for_tensors(node)
        if not places or not _same_with_tensors(node, places):
            continue
        for name, value in places.items():
            key = (type(value), value)
            if key not in constants:
                constants[key] = _unused(graph_module, f"_number_{len(constants)}")
                graph_module.register_buffer(constants[key], torch.tensor(value))
            with graph_module.graph.inserting_before(node):
                constant = graph_module.graph.get_attr(constants[key])
            constant.meta["val"] = _fake_mode(node).from_tensor(torch.tensor(value), static_shapes=True)
            if isinstance(name, int):
                node.update_arg(name, constant)
            else:
                node.update_kwarg(name, constant)
        changed = True
    return changed


def _numbers_for_tensors(node: Node) -> dict[int | str, Any]:
    """Place or name of each argument that is a number where the schema has a tensor."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return {}
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return {}
    found: dict[int | str, Any] = {}
    for place, argument in enumerate(node.target._schema.arguments):
        if not isinstance(argument.type, torch.TensorType):
            continue
        if argument.name in node.kwargs:
            key, value = argument.name, node.kwargs[argument.name]
        elif not argument.kwarg_only and place < len(node.args):
            key, value = place, node.args[place]
        else:
            continue
        if isinstance(value, bool | int | float):
            found[key] = value
    return found


def _same_with_tensors(node: Node, places: dict[int | str, Any]) -> bool:
    """Whether the node's value has the same dtype and shape with tensors for these numbers."""
    mode = _fake_mode(node)
    args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (list(node.args), dict(node.kwargs)))
    with mode, torch.no_grad():
        for name, value in places.items():
            where: Any = args if isinstance(name, int) else kwargs
            where[name] = torch.tensor(value)
        target: Any = node.target
        made = target(*args, **kwargs)
    expected = node.meta["val"]
    return made.dtype is expected.dtype and made.shape == expected.shape and made.stride() == expected.stride()


def _fake_mode(node: Node) -> Any:
    return node.meta["val"].fake_mode


def _unused(module: torch.nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


def _holds_graphs(module: GraphModule) -> bool:
    return any(isinstance(each, GraphModule) for each in module.children())
