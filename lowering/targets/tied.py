"""Keep a weight that two kinds of operators read in the file once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from mobizo_passes.graph.flops import node_flops
from mobizo_passes.graph.operators import operation_name

aten = torch.ops.aten


def weights_kept_outside(programs: Mapping[str, ExportedProgram], small_share: float) -> frozenset[str]:
    """FQNs of embedding tables whose `linear` users should not be delegated, in any method.

    A delegate keeps weights in its own form, next to the table that the (never delegated) embedding reads: a tied
    `lm_head` would be in the file twice. When the training step spends less than `small_share` of its FLOPs on it, one
    copy serves both.
    """
    tables = embedding_tables(programs)
    training = [program for name, program in programs.items() if name != "logits"]
    return frozenset(fqn for fqn in tables if all(_share(program, fqn) < small_share for program in training))


def embedding_tables(programs: Mapping[str, ExportedProgram]) -> set[str]:
    """FQNs of the constants that an embedding reads, in any method."""
    return {fqn for program in programs.values() for fqn in _read_by(program, aten.embedding.default, 0)}


def parameter_of(program: ExportedProgram, node: Any) -> str | None:
    """FQN of the parameter, buffer or other constant behind a placeholder, else None."""
    if not isinstance(node, torch.fx.Node):
        return None
    signature = program.graph_signature
    kinds = (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    )
    return next((kind[node.name] for kind in kinds if node.name in kind), None)


def product_weight(program: ExportedProgram, node: torch.fx.Node) -> str | None:
    """FQN of the constant that a `linear` or `mm` multiplies by; None for other nodes and factors."""
    product = node.op == "call_function" and operation_name(node) in ("linear", "mm")
    return parameter_of(program, node.args[1]) if product else None


def _read_by(program: ExportedProgram, target: Any, index: int) -> set[str]:
    found = {parameter_of(program, node.args[index]) for node in program.graph.nodes if node.target is target}
    return {fqn for fqn in found if fqn is not None}


def _share(program: ExportedProgram, fqn: str) -> float:
    total = mine = 0
    for node in program.graph.nodes:
        flops = node_flops(node)
        total += flops
        if product_weight(program, node) == fqn:
            mine += flops
    return mine / total if total else 0.0
