"""Decompose single nodes of a program, and leave all others as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.executorch_compat.programs import finished
from mobizo_passes.graph.inline import take_apart
from mobizo_passes.graph.ir import Ir


def decompose(program: ExportedProgram, nodes: Collection[Node], table: Mapping[Any, Any]) -> ExportedProgram:
    """The program with each of `nodes` replaced by its decomposition under `table`; every other node stays.

    BEFORE  loss = mse_loss(y: f32[4, 3], target: f32[4, 3])
    AFTER   d = sub(y, target);  s = pow(d, 2);  loss = mean(s)

    `ExportedProgram.run_decompositions` retraces the whole graph for the same result: seconds, where one node takes
    milliseconds. A node must be functional: none of its inputs is written.
    """
    ir = Ir.from_exported_program(program)
    chosen = {node.name for node in nodes}
    with torch.no_grad():
        for node in [each for each in ir.graph.nodes if each.name in chosen]:
            take_apart(ir, node, table)
    return finished(ir)
