"""Insert what a plain-torch function computes as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mobizo_passes.graph.facts import facts, note
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.nodes import arguments
from mobizo_passes.graph.operators import writes


class WritesInPlace(RuntimeError):
    """A function that was to be inlined changes one of its values in place."""


def inline(
    ir: Ir,
    fn: Callable[..., Any],
    operands: Sequence[Any],
    like: fx.Node | None = None,
    traced: dict[Any, fx.GraphModule] | None = None,
) -> fx.Node:
    """Trace `fn`, which returns one tensor, over the operands' shapes and insert its nodes at the insertion point.

    `like` is the node that they stand for; it lends them its origin. `traced` remembers traces: the sites of a model
    need only a few different ones.
    """
    (result,) = inline_all(ir, fn, operands, like, traced)
    return result


def inline_all(
    ir: Ir,
    fn: Callable[..., Any],
    operands: Sequence[Any],
    like: fx.Node | None = None,
    traced: dict[Any, fx.GraphModule] | None = None,
    table: Mapping[Any, Any] | None = None,
) -> list[fx.Node]:
    """As `inline`, for a function with any number of results; `table` as for `trace`."""
    key = None if like is None else (like.target, *(_key(a) for a in (*like.args, *like.kwargs.items())))
    module = (traced or {}).get(key)
    if module is None:
        module = trace(fn, operands, table)
        if traced is not None and key is not None:
            traced[key] = module
    return splice(ir, module, operands, like)


def take_apart(
    ir: Ir,
    node: fx.Node,
    table: Mapping[Any, Any] | None = None,
    traced: dict[Any, fx.GraphModule] | None = None,
) -> None:
    """Replace a call by what its operator consists of, under the decompositions of `table`; `traced` as for `inline`.

    Raises `WritesInPlace`, and leaves the call, if that can't be written without changing a value in place.
    """
    operands, spec = pytree.tree_flatten((node.args, node.kwargs))
    target: Any = node.target

    def run(*values: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        return target(*args, **kwargs)

    with ir.before(node):
        results = inline_all(ir, run, operands, node, traced, table)
    if isinstance(node.meta["val"], Tensor):
        ir.replace(node, results[0])
        return
    for user in list(node.users):
        # A node with several results is read item by item.
        ir.replace(user, results[arguments(user).index])
    ir.graph.erase_node(node)


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


def trace(fn: Callable[..., Any], operands: Sequence[Any], table: Mapping[Any, Any] | None = None) -> fx.GraphModule:
    """Trace `fn` over the values of the nodes among its operands; the result has a placeholder for each of those.

    `table` has the decompositions of operators that are taken apart. Raises `WritesInPlace` if what is traced can't be
    written without changing a value in place.
    """

    def over_nodes(*values: Tensor) -> Any:
        given = iter(values)
        return fn(*(next(given) if isinstance(a, fx.Node) else a for a in operands))

    values = [a.meta["val"] for a in operands if isinstance(a, fx.Node)]

    def traced(what: Callable[..., Any]) -> fx.GraphModule:
        return make_fx(what, decomposition_table=table, tracing_mode="fake")(*values)

    module = traced(over_nodes)
    if _writes(module.graph):
        # A composite is taken apart below the reach of `functionalize`; its parts are not.
        module = traced(torch.func.functionalize(module))
    module.graph.eliminate_dead_code()
    if _writes(module.graph):
        raise WritesInPlace(", ".join(_writes(module.graph)))
    return module


def _writes(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if writes(node.target)]


def _key(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        value = arg.meta["val"]
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(arg) if isinstance(arg, list) else arg
