"""Dialects of legalized programs: each target's own rules find what is planted."""

from __future__ import annotations

import pytest

from lowering.targets import get_target
from mobizo_passes.errors import ContractError
from tests.passes.contract import parsed

FOUR = "%x: f32[2, 3, 4, 8] = batch 'x'\n%w: f32[5, 8] = parameter 'w'\n"


@pytest.mark.parametrize(
    ("target", "line", "rule"),
    [
        ("portable", "%y: f32[48, 4] = aten.reshape(%x, [48, 4])", "copies instead of views"),
        ("portable", "%y: f32[2, 3, 4, 8] = aten._softmax(%x, -1, False)", "axes counted from the front"),
        ("portable", "%y: f32[2, 3, 4, 8] = aten.slice_copy(%x, 3, 0, end)", "slices that end within their axis"),
        ("portable", "%y: f32[2, 3, 4, 8] = aten.mul(%x, 2)", "floats in float arithmetic"),
        ("xnnpack", "%y: f32[2, 3, 4, 4] = aten.linear(%x, %b)", "a weight behind every linear"),
        ("xnnpack", "%y: f32[2, 3, 4, 8] = aten.silu(%x)", "x * sigmoid(x)"),
        ("xnnpack", "%y: f32[2, 3, 4, 8] = aten.gelu(%x, approximate='tanh')", "exact GELU alone"),
        ("xnnpack", "%y: f32[2, 3, 4, 8] = aten.layer_norm(%x, [8])", "norms taken apart"),
        ("vulkan", "%y: f32[2, 3, 4, 5] = aten.linear(%x, %w)", "at most 3 axes"),
        ("vulkan", "%y: f32[2, 3, 4, 8] = aten.gelu(%x)", "GELU written out"),
        ("qnn", "%y: f32[2, 3, 4, 5] = aten.linear(%x, %w)", "at most 2 axes"),
        ("qnn", "%y: f32[2, 3, 4, 8] = aten.mul(%x, 2.0)", "tensors in float arithmetic"),
    ],
)
def test_what_a_target_does_not_take_is_found(target: str, line: str, rule: str):
    computed = "%b: f32[4, 8] = batch 'b'\n"
    shape = line.partition(" = ")[0].partition(": ")[2]
    ir = parsed(f"{FOUR}{computed}{line}\nreturn %y: {shape} = logits")
    with pytest.raises(ContractError) as error:
        get_target(target).dialect.check(ir, "here")
    assert error.value.expected == rule
    assert error.value.node is ir.output_node("logits")
