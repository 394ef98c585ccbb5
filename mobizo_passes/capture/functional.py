"""The functional form of an exported program."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._export.verifier import Verifier, load_verifier
from torch.export import ExportedProgram

# What `torch.export.export` gives may write in place; programs of this dialect do not.
DIALECT = "ATEN"


def functional(exported: ExportedProgram) -> tuple[ExportedProgram, type[Verifier]]:
    """The program after `run_decompositions({})`, and the verifier of its dialect.

    BEFORE  y = add_(x: f32[4, 3], 1.0);  z = flatten(y)
    AFTER   y = add(x, 1.0);              z = view(y, [12])

    torch traces the whole graph anew for it, which takes longer than the export of a small model. A graph in which
    nothing would change is given back as it is.
    """
    if not all(_stays(node) for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return exported, load_verifier(DIALECT)


def _stays(node: fx.Node) -> bool:
    """Whether tracing the node anew gives the same node: it is read, writes nothing, and no composite to take apart."""
    if node.op != "call_function":
        return True
    if not node.users:
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return not _is_cia_op(node.target) or _is_preservable_cia_op(node.target)
