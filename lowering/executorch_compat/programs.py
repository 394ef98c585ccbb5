"""A program as ExecuTorch's stages take it."""

from __future__ import annotations

from collections.abc import Iterable

from torch.export import ExportedProgram

from mobizo_passes.graph.dialect import Dialect
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass, PassRecord, checking, run_passes

# What a node was before the passes. XNNPACK's stage looks for linears by it (and, without a source function, by the
# module), and would take an adapter's `bmm` for one.
_STALE = ("torch_fn", "from_node")
_NO_SOURCE = [("", "mobizo")]


def finished(ir: Ir) -> ExportedProgram:
    """The program of a graph that was edited: nothing unused in it, and no memory of what its nodes were before."""
    ir.eliminate_dead_code()
    for node in ir.graph.nodes:
        for key in _STALE:
            node.meta.pop(key, None)
        node.meta["source_fn_stack"] = _NO_SOURCE
    return ir.to_exported_program()


def rewritten(
    program: ExportedProgram, passes: Iterable[Pass], dialect: Dialect | None = None
) -> tuple[ExportedProgram, tuple[PassRecord, ...]]:
    """The program after `passes`, and a record of each; the one given stays as it is. Weights are shared.

    Where graphs are checked, the result must be of the `dialect`.
    """
    records: list[PassRecord] = []
    ir = run_passes(Ir.from_exported_program(program), passes, records, texts=False)
    if dialect is not None and checking():
        dialect.check(ir, f"after {records[-1].name}", values=True)
    return finished(ir), tuple(records)
