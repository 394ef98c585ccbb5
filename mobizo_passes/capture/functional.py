"""The functional form of an exported program."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._export.verifier import Verifier, load_verifier
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from mobizo_passes.graph.inline import WritesInPlace, take_apart
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.operators import writes

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
    if any(writes(node.target) or node.target in _TRACED for node in exported.graph.nodes):
        exported = exported.run_decompositions({})
    return exported, load_verifier(DIALECT)


class DetachedData(TorchFunctionMode):
    """Reads `tensor.data` as `tensor.detach()` for the time of an export, which loses sight of the former.

    The same values, cut off from gradients in the same way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Each access makes another object of the getter.
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


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
