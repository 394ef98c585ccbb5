"""Traces are remembered: what is equal is traced once, what differs is told apart."""

from __future__ import annotations

import torch
from torch import Tensor

from mobizo_passes.graph.inline import OperatorCall, trace
from tests.passes.contract import parsed

CALLS = parsed(
    """
    %a: f32[2, 3] = batch 'a'
    %b: f32[2, 3] = batch 'b'
    %c: f32[3, 2] = batch 'c'
    %plain: f32[2, 3] = aten.add(%a, %b)
    %other_order: f32[2, 3] = aten.add(%b, %a)
    %scaled: f32[2, 3] = aten.add(%a, %b, alpha=2)
    %other_shape: f32[3, 2] = aten.add(%c, %c)
    return %plain: f32[2, 3] = logits
    """
)


def scaled(x: Tensor, by: float) -> Tensor:
    return x * by


def test_equal_calls_are_traced_once_and_arguments_shapes_and_types_of_numbers_are_told_apart():
    sums = [n for n in CALLS.graph.nodes if n.op == "call_function"]
    modules = [trace(*OperatorCall.of(n)) for n in sums]
    # The order of nodes is no part of a trace: it has a placeholder for each.
    assert modules[0] is modules[1]
    assert len({id(m) for m in modules}) == 3
    x = CALLS.placeholders("batch")[0]
    assert trace(scaled, [x, 2]) is not trace(scaled, [x, 2.0])
    assert trace(scaled, [x, 2]) is trace(scaled, [x, 2])


def test_a_function_with_state_is_traced_each_time():
    x = CALLS.placeholders("batch")[0]
    by = 2.0

    def scale(x: Tensor) -> Tensor:
        return x * by

    first = trace(scale, [x], remember=False)
    by = 3.0
    ones = torch.ones(2, 3)
    assert torch.equal(first(ones), 2 * ones)
    assert torch.equal(trace(scale, [x], remember=False)(ones), 3 * ones)
