"""Insert what a plain-torch function computes as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mobizo_passes.graph.ir import Ir


def inline(
    ir: Ir,
    fn: Callable[..., Any],
    operands: Sequence[Any],
    like: fx.Node | None = None,
    traced: dict[Any, fx.Graph] | None = None,
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
    traced: dict[Any, fx.Graph] | None = None,
) -> list[fx.Node]:
    """As `inline`, for a function with any number of results."""
    nodes = [a for a in operands if isinstance(a, fx.Node)]
    key = None if like is None else (like.target, *(_key(a) for a in like.args))
    graph = (traced or {}).get(key)
    if graph is None:
        with ir.fake:
            graph = trace(fn, operands).graph
        if traced is not None and key is not None:
            traced[key] = graph
    name = fn.__name__ if like is None else like.target
    feed = iter(nodes)
    mapping: dict[fx.Node, fx.Node] = {}
    for inner in graph.nodes:
        if inner.op == "placeholder":
            mapping[inner] = next(feed)
        elif inner.op == "output":
            results: Any = inner.args[0]
            return [mapping[r] for r in (results if isinstance(results, tuple | list) else [results])]
        elif inner.op == "call_function":
            args, kwargs = fx.map_arg((inner.args, inner.kwargs), mapping.__getitem__)
            mapping[inner] = ir.call(inner.target, *args, like=like, **kwargs)
            if like is not None and "expanded" in like.meta:
                mapping[inner].meta["expanded"] = True
        else:
            raise RuntimeError(f"decomposing {name} met an unexpected {inner.op} node")
    raise RuntimeError(f"decomposing {name} gave no output")


class WritesInPlace(RuntimeError):
    """A function that was to be inlined changes one of its values in place."""


def trace(
    fn: Callable[..., Any],
    operands: Sequence[Any],
    table: Mapping[Any, Any] | None = None,
    mode: Literal["real", "fake"] = "real",
) -> fx.GraphModule:
    """Trace `fn` over the values of the nodes among its operands; the result has a placeholder for each of those.

    `table` has the decompositions of operators that are taken apart; `mode` is the `tracing_mode` of `make_fx`. Raises
    `WritesInPlace` if what is traced can't be written without changing a value in place.
    """

    def over_nodes(*values: Tensor) -> Any:
        given = iter(values)
        return fn(*(next(given) if isinstance(a, fx.Node) else a for a in operands))

    def traced(what: Callable[..., Any]) -> fx.GraphModule:
        return make_fx(what, decomposition_table=table, tracing_mode=mode)(*values)

    values = [a.meta["val"] for a in operands if isinstance(a, fx.Node)]
    module = traced(over_nodes)
    if _writes(module.graph):
        # A composite is taken apart below the reach of `functionalize`; its parts are not.
        module = traced(torch.func.functionalize(module))
    module.graph.eliminate_dead_code()
    if _writes(module.graph):
        raise WritesInPlace(", ".join(_writes(module.graph)))
    return module


def _writes(graph: fx.Graph) -> list[str]:
    schemas = {str(n.target): getattr(n.target, "_schema", None) for n in graph.nodes}
    return [name for name, schema in schemas.items() if schema is not None and schema.is_mutable]


def _key(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        value = arg.meta["val"]
        return value.dtype, tuple(value.shape), value.stride()
    return tuple(arg) if isinstance(arg, list) else arg
