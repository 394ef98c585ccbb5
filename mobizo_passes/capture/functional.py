"""The functional form of an exported program."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._export.verifier import Verifier, load_verifier
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobizo_passes.graph.inline import WritesInPlace, inline_all
from mobizo_passes.graph.ir import Ir

# What `torch.export.export` gives may write in place; programs of this dialect do not.
DIALECT = "ATEN"
# Taken apart alone, these end in another operator than when the graph is traced.
_TRACED = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)


def functional(exported: ExportedProgram) -> tuple[ExportedProgram, type[Verifier]]:
    """The program without writes in place, and the verifier of its dialect.

    BEFORE  y = add_(x: f32[4, 3], 1.0);  z = reshape(y, [12])
    AFTER   y = add(x, 1.0);              z = view(y, [12])

    This is `run_decompositions({})`, for which torch traces the whole graph anew: as long as the export itself takes.
    A graph that writes nothing is given back as it is; `decompose_composites` does the rest of it.
    """
    if any(_writes(node) or node.target in _TRACED for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return exported, load_verifier(DIALECT)


def decompose_composites(ir: Ir) -> None:
    """Take apart, node by node, the composites that `run_decompositions({})` takes apart.

    BEFORE  y: f32[4, 3] = to(x: f32[4, 3], float32);  z = reshape(y, [12])
    AFTER   z = view(x, [12])
    """
    traced: dict[Any, fx.Graph] = {}
    for node in list(ir.graph.nodes):
        if node.op == "call_function" and node.users and is_composite(node.target):
            replace_by_parts(ir, node, traced)


def is_composite(target: Any) -> bool:
    """Whether `run_decompositions({})` takes the operator apart."""
    return isinstance(target, torch._ops.OpOverload) and _is_cia_op(target) and not _is_preservable_cia_op(target)


def replace_by_parts(ir: Ir, node: fx.Node, traced: dict[Any, fx.Graph] | None = None) -> bool:
    """Replace a call by what it consists of; False where that can't be said without a write in place."""
    operands, spec = pytree.tree_flatten((node.args, node.kwargs))
    target: Any = node.target

    def run(*values: Any) -> Any:
        args, kwargs = pytree.tree_unflatten(list(values), spec)
        return target(*args, **kwargs)

    with ir.graph.inserting_before(node):
        try:
            results = inline_all(ir, run, operands, node, traced)
        except WritesInPlace:
            return False
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            # A node with several results is read by `getitem` alone.
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            ir.graph.erase_node(user)
    ir.graph.erase_node(node)
    return True


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
