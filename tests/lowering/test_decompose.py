"""Single nodes are decomposed in place: the same numbers, the same operators as a retrace, all else untouched."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir.tracer import _default_decomposition_table
from torch.export import ExportedProgram

from lowering.decompose import decompose
from lowering.executorch_compat.retracing import as_incremental
from tests.lowering.passkit import Fn, export, ops_of

aten = torch.ops.aten
TABLE: dict[Any, Any] = dict(_default_decomposition_table())
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def mul_of(pair):
    return pair[0] * pair[1]


# A function of x [3, 4, 6], and the operator in it that ExecuTorch takes apart.
COMPOSITE = {
    "mse_loss": (lambda m, x: F.mse_loss(x.sin(), m.a) + 1, aten.mse_loss.default),
    "binary cross-entropy": (
        lambda m, x: F.binary_cross_entropy_with_logits(x.sin(), m.e, pos_weight=m.b),
        aten.binary_cross_entropy_with_logits.default,
    ),
    "layer_norm": (lambda m, x: F.layer_norm(x, [6], m.b, m.b) * x, aten.layer_norm.default),
    "rms_norm, whose decomposition writes": (lambda m, x: F.rms_norm(x, [6], m.b), aten.rms_norm.default),
    "matmul": (lambda m, x: torch.matmul(x, m.c).cos(), aten.matmul.default),
    "conv1d": (lambda m, x: F.conv1d(x, m.d, padding=1), aten.conv1d.default),
    "attention": (lambda m, x: F.scaled_dot_product_attention(x[None], m.a[None], x[None]), None),
    "several outputs": (lambda m, x: mul_of(torch.std_mean(x, 2, correction=1)), aten.std_mean.correction),
    "a list of tensors": (lambda m, x: torch.hstack([x, m.a]), aten.hstack.default),
}


def model(name: str) -> Fn:
    return Fn(
        COMPOSITE[name][0],
        a=X.flip(0).clone(),
        b=X[0, 0].clone(),
        c=X[0].T.clone(),
        d=X[:2, :, :3].clone(),
        e=X.sigmoid(),
    )


def retraced(program: ExportedProgram) -> ExportedProgram:
    return program.run_decompositions(TABLE)


@pytest.mark.parametrize("name", COMPOSITE)
def test_a_composite_operator_becomes_what_a_retrace_makes_of_it(name: str):
    program = export(model(name), (X,))
    target = COMPOSITE[name][1] or aten.scaled_dot_product_attention.default
    nodes = [node for node in program.graph.nodes if node.target is target]
    assert nodes
    found = decompose(program, nodes, TABLE)
    assert not [node for node in found.graph.nodes if node.target is target]
    torch.testing.assert_close(found.module()(X), program.module()(X), rtol=0, atol=1e-6)
    assert ops_of(retraced(found)) == ops_of(retraced(program))


def test_all_other_nodes_are_left_as_they_are():
    program = export(Fn(lambda m, x: F.layer_norm(F.gelu(x).sin(), [6]).cos()), (X,))
    nodes = [node for node in program.graph.nodes if node.target is aten.layer_norm.default]
    found = decompose(program, nodes, TABLE)
    ops = ops_of(found)
    assert (ops["gelu"], ops["sin"], ops["cos"], ops["layer_norm"]) == (1, 1, 1, 0)
    names = {node.name for node in found.graph.nodes}
    assert {node.name for node in program.graph.nodes} - names == {nodes[0].name}


def test_incremental_programs_decompose_node_by_node():
    program = as_incremental(export(model("layer_norm"), (X,)))
    table = TABLE
    once = program.run_decompositions(table)
    assert ops_of(once) == ops_of(retraced(program))
    assert once.run_decompositions(table) is once


def test_what_is_kept_whole_is_kept():
    program = as_incremental(export(torch.nn.Linear(6, 5), (X,)))
    assert ops_of(program.run_decompositions(TABLE))["linear"] == 1
