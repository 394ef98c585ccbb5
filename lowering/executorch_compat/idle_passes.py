"""Spare the retraces of ExecuTorch's passes that have nothing to rewrite."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from lowering.executorch_compat.patching import patched

# Passes that do nothing but rewrite single calls in `call_operator`. After our legalization most have nothing to do.
_PASSES = (
    ("executorch.exir.passes.normalize_transpose_pass", "NormalizeTransposePass"),
    ("executorch.exir.passes.replace_broken_ops_with_function_ops_pass", "ReplaceBrokenOpsWithFunctionalOpsPass"),
    ("executorch.exir.passes.scalar_to_tensor_pass", "ScalarToTensorPass"),
    ("executorch.exir.passes", "SymToTensorPass"),
    ("executorch.exir.passes.remove_mixed_type_operators", "RemoveMixedTypeOperators"),
    ("torch._export.passes.replace_view_ops_with_view_copy_ops_pass", "ReplaceViewOpsWithViewCopyOpsPass"),
)


class _RewritesError(Exception):
    """The pass under trial does not leave a call as it is."""


@contextmanager
def without_idle_passes() -> Iterator[None]:
    """Within, six of ExecuTorch's passes give a graph back as it is when they would rewrite none of its calls.

    Each would retrace the whole graph for it, a millisecond a node. First the pass's own rule is asked about every
    call, without computing anything: the graph is traced only if one is rewritten.
    """
    with ExitStack() as stack:
        for module, name in _PASSES:
            each = getattr(importlib.import_module(module), name)
            stack.enter_context(patched(each, "call", _tried_first(each.call)))
        yield


def _tried_first(call: Any) -> Any:
    def tried(self: Any, graph_module: GraphModule) -> PassResult:
        if rewrites_nothing(self, graph_module):
            return PassResult(graph_module, False)
        return call(self, graph_module)

    return tried


def rewrites_nothing(each: Any, graph_module: GraphModule) -> bool:
    """Whether the pass `each` would put every call of the graph back as it is."""
    base = importlib.import_module(next(c for c in type(each).__mro__ if "_fx" in c.__dict__).__module__)
    asked: list[Any] = []

    def as_it_was(kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        node, *given = asked
        if kind != "call_function" or target is not node.target or not _same((args, kwargs), tuple(given)):
            raise _RewritesError
        return base.ProxyValue(node.meta["val"], node)

    @functools.cache
    def value_of(node: Node) -> Any:
        return base.ProxyValue(node.meta["val"], node)

    each._fx = as_it_was
    try:
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            args, kwargs = map_arg((node.args, node.kwargs), value_of)
            asked[:] = [node, args, kwargs]
            each.call_operator(node.target, args, kwargs, base.NodeMetadata(node.meta))
    except _RewritesError:
        return False
    finally:
        del each._fx
    return True


def _same(left: Any, right: Any) -> bool:
    """Whether two nests of arguments hold the same objects; a number or list may have been copied."""
    if left is right:
        return True
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(value, right[name]) for name, value in left.items())
    return type(left) is type(right) and not _is_value(left) and left == right


def _is_value(each: Any) -> bool:
    return isinstance(each, torch.Tensor) or hasattr(each, "proxy_or_node")
