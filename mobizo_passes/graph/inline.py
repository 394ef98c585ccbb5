"""Insert what a plain-torch function computes as nodes of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mobizo_passes.graph.facts import facts, note
from mobizo_passes.graph.infer import described, given
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.operators import writes


class WritesInPlace(RuntimeError):
    """A function that was to be inlined changes one of its values in place."""


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator as a function of its flattened arguments. Equal calls are equal objects."""

    target: Any
    spec: pytree.TreeSpec

    def __call__(self, *leaves: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return self.target(*args, **kwargs)

    @staticmethod
    def of(node: fx.Node, target: Any = None) -> tuple[OperatorCall, list[Any]]:
        """The call of a node, perhaps of another target, and its flattened arguments."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        return OperatorCall(target or node.target, spec), leaves


def inline(
    ir: Ir, fn: Callable[..., Any], operands: Sequence[Any], like: fx.Node | None = None, *, remember: bool = True
) -> fx.Node:
    """Trace `fn`, which returns one tensor, over the operands' shapes and insert its nodes at the insertion point.

    `like` is the node that they stand for; it lends them its origin. `remember` as for `trace`.
    """
    (result,) = splice(ir, trace(fn, operands, remember=remember), operands, like)
    return result


def inline_all(
    ir: Ir,
    fn: Callable[..., Any],
    operands: Sequence[Any],
    like: fx.Node | None = None,
    table: Mapping[Any, Any] | None = None,
) -> list[fx.Node]:
    """As `inline`, for a function with any number of results; `table` as for `trace`."""
    return splice(ir, trace(fn, operands, table), operands, like)


def take_apart(ir: Ir, node: fx.Node, table: Mapping[Any, Any] | None = None) -> None:
    """Replace a call by what its operator consists of, under the decompositions of `table`.

    Raises `WritesInPlace`, and leaves the call, if that can't be written without changing a value in place.
    """
    call, operands = OperatorCall.of(node)
    with ir.before(node):
        results = inline_all(ir, call, operands, node, table)
    if isinstance(node.meta["val"], Tensor):
        ir.replace(node, results[0])
        return
    for user in list(node.users):
        # A node with several results is read item by item.
        ir.replace(user, results[arguments(user).index])
    ir.graph.erase_node(node)


def call_again(ir: Ir, node: fx.Node, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Call a node's operator once more, at the insertion point, on what `values` has in place of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: values.get(each, each))
    return ir.call(node.target, *args, like=node, **kwargs)


def reshape_views(ir: Ir) -> None:
    """Let what was traced reshape where it views: what it is put on has other strides, or will have.

    BEFORE  %y: f32[4, 6] = aten.view(%x, [4, 6])
    AFTER   %y: f32[4, 6] = aten.reshape(%x, [4, 6])
    """
    for node in ir.find(torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        node.target = torch.ops.aten.reshape.default


def splice(ir: Ir, module: fx.GraphModule, operands: Sequence[Any], like: fx.Node | None = None) -> list[fx.Node]:
    """Insert a traced graph at the insertion point, over the nodes among the operands; returns its results."""
    feed = iter([a for a in operands if isinstance(a, fx.Node)])
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(feed)
        elif node.op == "get_attr":
            copies[node] = ir.add_constant("traced", getattr(module, str(node.target)))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = ir.call(node.target, *args, like=like, **kwargs)
            if like is not None:
                note(copies[node], expanded=facts(like).expanded)
    results: Any = module.graph.output_node().args[0]
    return [copies[each] for each in (results if isinstance(results, tuple | list) else [results])]


def trace(
    fn: Callable[..., Any], operands: Sequence[Any], table: Mapping[Any, Any] | None = None, *, remember: bool = True
) -> fx.GraphModule:
    """Trace `fn` over the values of the nodes among its operands; the result has a placeholder for each of those.

    `table` has the decompositions of operators that are taken apart. Without it, traces are remembered, because the
    layers of a model need only a few different ones: `fn` must be a function of a module, or a value whose equals
    compute the same, and the result must not be changed. Raises `WritesInPlace` if what is traced can't be written
    without changing a value in place.
    """
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in operands]
    key = described(values) if table is None and remember else None
    return _traced(fn, values, table) if key is None else _remembered(fn, key)


@functools.lru_cache(maxsize=1024)
def _remembered(fn: Callable[..., Any], values: Any) -> fx.GraphModule:
    module = _traced(fn, given(values, FakeTensorMode()), None)
    for node in module.graph.nodes:
        # Values of the trace, of no use to anyone, would be kept with it.
        node.meta.clear()
    return module


def _traced(fn: Callable[..., Any], operands: Sequence[Any], table: Mapping[Any, Any] | None) -> fx.GraphModule:
    def over_tensors(*tensors: Tensor) -> Any:
        feed = iter(tensors)
        return fn(*(next(feed) if isinstance(a, Tensor) else a for a in operands))

    def traced(what: Callable[..., Any]) -> fx.GraphModule:
        tensors = [a for a in operands if isinstance(a, Tensor)]
        return make_fx(what, decomposition_table=table, tracing_mode="fake")(*tensors)

    module = traced(over_tensors)
    if _writes(module.graph):
        # A composite is taken apart below the reach of `functionalize`; its parts are not.
        module = traced(torch.func.functionalize(module))
    module.graph.eliminate_dead_code()
    if _writes(module.graph):
        raise WritesInPlace(", ".join(_writes(module.graph)))
    return module


def _writes(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if writes(node.target)]
