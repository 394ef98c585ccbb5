"""Keep ExecuTorch from retracing programs that have nothing left to decompose."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph
from torch.fx.traceback import NodeSource

from lowering.decompose import decompose
from lowering.executorch_compat.patching import patched
from mobizo_passes.graph.operators import is_functional

# Delegates take these whole; ExecuTorch has a kernel for each. A target may have more, for which it has none.
KEPT_WHOLE = (torch.ops.aten.linear.default,)


class IncrementalProgram(ExportedProgram):
    """An ExportedProgram that decomposes only the nodes that would change, and never what is `kept` whole.

    `to_edge_transform_and_lower` retraces every program at least twice, seconds for each ten transformer layers. After
    the legalization passes nearly every node is functional core ATen already, and a retrace gives it back as it was.
    """

    kept: tuple[Any, ...] = KEPT_WHOLE

    def run_decompositions(
        self, decomp_table: dict[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        options = {"decompose_custom_triton_ops": decompose_custom_triton_ops}
        if decomp_table is None:
            return super().run_decompositions(None, **options)
        table = {op: rule for op, rule in decomp_table.items() if op not in self.kept}
        if any(_needs_retrace(node) for node in self.graph.nodes):
            return as_incremental(super().run_decompositions(table, **options), self.kept)
        nodes = [node for node in self.graph.nodes if node.target in table]
        return as_incremental(decompose(self, nodes, table), self.kept) if nodes else self


def as_incremental(
    program: ExportedProgram, kept: tuple[Any, ...] = KEPT_WHOLE, graph: Graph | None = None
) -> IncrementalProgram:
    """The same program as an IncrementalProgram that keeps `kept` whole: same weights, its graph or a copy of it."""
    incremental = IncrementalProgram(
        root=program.graph_module,
        graph=program.graph if graph is None else graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    incremental.kept = kept
    return incremental


def copied(graph: Graph) -> Graph:
    """A copy with the same names: ExecuTorch's stages change graphs in place."""
    made = copy.deepcopy(graph)
    for node, former in zip(made.nodes, graph.nodes, strict=True):
        # A copied name that is a function of Python's would get a number, and no longer be the signature's.
        node.name = former.name
    return made


@contextmanager
def without_provenance() -> Iterator[None]:
    """Within, node provenance records are shared, not copied.

    torch copies each node's whole chain of former nodes at every one of some thirty passes: a tenth of the time.
    """
    with patched(NodeSource, "__deepcopy__", lambda self, memo: self):
        yield


def _needs_retrace(node: torch.fx.Node) -> bool:
    """Whether the node is not functional, or no operator of ATen's kind: it can't be replaced on its own."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return not is_functional(node.target)
