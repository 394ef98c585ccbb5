"""The functional form of an exported program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._export.verifier import Verifier, load_verifier
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mobizo_passes.graph.inline import WritesInPlace, take_apart
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.operators import writes

# What `torch.export.export` gives may write in place; programs of this dialect do not.
DIALECT = "ATEN"
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
# Taken apart alone, these end in another operator than when the graph is traced.
_TRACED = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


def functional(exported: ExportedProgram) -> tuple[ExportedProgram, type[Verifier]]:
    """The program without writes in place, and the verifier of its dialect.

    BEFORE  y = add_(x: f32[4, 3], 1.0);  z = reshape(y, [12])
    AFTER   y = add(x, 1.0);              z = view(y, [12])

    This is `run_decompositions({})`, for which torch traces the whole graph anew: as long as the export itself takes.
    A graph that writes nothing is given back as it is; `decompose_composites` does the rest of it. Parts under autocast
    or vmap stand in graphs of their own, which the tracing takes in.
    """
    _inline_no_grad(exported.graph_module)
    _group_instance_norms(exported.graph_module.graph)
    if any(writes(n.target) or n.target in _TRACED or _holds_a_graph(n) for n in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return exported, load_verifier(DIALECT)


def _holds_a_graph(node: fx.Node) -> bool:
    """Whether a part of the model stands in a graph or a function of its own, as under autocast or `torch.vmap`."""
    by_vmap = getattr(node.target, "__module__", "").startswith("torch._functorch.")
    return by_vmap or isinstance(node.target, torch._ops.HigherOrderOperator)


def _inline_no_grad(graph_module: fx.GraphModule) -> None:
    """Take in the parts that ran with gradients switched off, which an export puts into graphs of their own.

    BEFORE  y = wrap_with_set_grad_enabled(False, part, x)[0];  part: detach(tanh(x))
    AFTER   y = detach(tanh(x))
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_NO_GRAD):
        part: Any = node.args[1]
        inner: fx.Graph = getattr(graph_module, part.target).graph
        values = dict(zip(inner.find_nodes(op="placeholder"), node.args[2:], strict=True))
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(inner, values)
        for result in list(node.users):
            result.replace_all_uses_with(results[result.args[1]])
            graph.erase_node(result)
        graph.erase_node(node)
    for part in graph.find_nodes(op="get_attr"):
        if not part.users:
            graph.erase_node(part)


def _group_instance_norms(graph: fx.Graph) -> None:
    """Write norms of each channel of each example as group norms; tracing takes them for norms over the batch.

    BEFORE  y = instance_norm(x: f32[4, 8, 5], w, b, None, None, True, 0.1, 1e-5, True)
    AFTER   y = group_norm(x, 8, w, b, 1e-5)
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.instance_norm.default):
        x, weight, bias, mean, _, _, _, eps, *_ = node.args
        if mean is None:
            node.target = torch.ops.aten.group_norm.default
            node.args = (x, x.meta["val"].shape[1], weight, bias, eps)


class CutGradients(TorchFunctionMode):
    """Writes down as `detach`, for the time of an export, what cuts off gradients and leaves no trace in its graph.

    That is `tensor.data`, and what is computed under `torch.no_grad()` or `torch.inference_mode()`. `functions` are the
    subclasses of `torch.autograd.Function` that ran: an export sees their forward alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[str] = []
        # The forward of a function runs without gradients, and has one all the same.
        self._inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Each access makes another object of the getter.
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        result = func(*args, **(kwargs or {}))
        # Before it traces, torch makes fake tensors of the model's, without gradients too.
        traced = get_proxy_mode() is not None
        return _cut(result) if traced and not self._inside and func is not Tensor.detach else result

    @contextlib.contextmanager
    def watching_functions(self) -> Iterator[None]:
        """Note which functions with a backward of their own run meanwhile."""
        original: Any = torch.autograd.Function.__dict__["apply"]

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            name = f"{cls.__module__}.{cls.__qualname__}"
            if not name.startswith("torch.") and name not in self.functions:
                self.functions.append(name)
            self._inside += 1
            try:
                result = original.__func__(cls, *args, **kwargs)
            finally:
                self._inside -= 1
            return result if self._inside else _cut(result)

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = original


def _cut(result: Any) -> Any:
    """Detach what is computed where gradients are switched off."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return result
    return tree_map_only(Tensor, Tensor.detach, result)


def decompose_composites(ir: Ir) -> None:
    """Take apart, node by node, the composites that `run_decompositions({})` takes apart.

    BEFORE  y: f32[4, 3] = to(x: f32[4, 3], float32);  z = reshape(y, [12])
    AFTER   z = view(x, [12])
    """
    for node in list(ir.graph.nodes):
        if node.op == "call_function" and node.users and is_composite(node.target):
            with contextlib.suppress(WritesInPlace):
                take_apart(ir, node)


def is_composite(target: Any) -> bool:
    """Whether `run_decompositions({})` takes the operator apart."""
    return isinstance(target, torch._ops.OpOverload) and _is_cia_op(target) and not _is_preservable_cia_op(target)
