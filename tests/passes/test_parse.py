"""The printed form of a program reads back into the same program; what can't be read is refused by its line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mobizo_passes as mz
from mobizo_passes.errors import describe
from mobizo_passes.graph.facts import facts, role
from mobizo_passes.graph.ir import Input
from mobizo_passes.graph.layout import Layout
from mobizo_passes.graph.parse import seeded_value
from mobizo_passes.graph.text import to_text
from tests.passes import contract
from tests.text_form import check_text, values_of

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_programs() -> list[tuple[str, str]]:
    programs: list[tuple[str, str]] = []
    for path in sorted(GOLDEN.glob("*.txt")):
        before, mark, after = path.read_text().removeprefix("BEFORE\n").partition("\nAFTER\n")
        programs += [(f"{path.stem} before", before)] + ([(f"{path.stem} after", after)] if mark else [])
    return programs


@pytest.mark.parametrize(("name", "text"), golden_programs())
def test_golden_texts_read_back(name: str, text: str) -> None:
    assert to_text(mz.parse(text)) == text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {}),
        ("attention", {}),
        ("block-tokens", {}),
        ("own-loss", {}),
        ("mlp", {"estimator": mz.TwoSided(4, normalize="std"), "optimizer": mz.AdamW()}),
        ("attention", {"estimator": mz.Exact()}),
    ],
    ids=str,
)
def test_programs_read_back_and_give_the_same_numbers(compiled: Any, name: str, options: dict[str, Any]) -> None:
    program, _, _ = compiled(name, **options)
    for method in program.methods:
        for ir in (program._methods[method], program.core_ir(method)):
            check_text(ir, {**contract.values_of(ir), **values_of(program)})


def test_a_program_of_no_calls() -> None:
    text = "%x: f32[2] = batch 'x'\n\nreturn %x: f32[2] = logits\n"
    ir = mz.parse(text)
    assert to_text(ir) == text
    assert torch.equal(ir.run({"x": torch.ones(2)})["logits"], torch.ones(2))


# What may stand in a call, with the overload that torch takes for it.
CALLS = [
    ("f32[2, 3]", "aten.mul(%x, 1.5)", "aten.mul.Tensor"),
    ("f32[2, 3]", "aten.mul.Scalar(%x, 1.5)", "aten.mul.Scalar"),
    ("f32[2, 3]", "aten.full_like(%x, -inf)", "aten.full_like.default"),
    ("f32[2, 3]", "aten.full_like(%x, nan)", "aten.full_like.default"),
    ("f32[2, 3]", "aten.mul(%x, -1e-08)", "aten.mul.Tensor"),
    ("f32[2]", "aten.sum(%x, [1])", "aten.sum.dim_IntList"),
    ("f64[]", "aten.sum(%x, dtype=f64)", "aten.sum.default"),
    ("f32[2, 2]", "aten.slice(%x, 1, 1, end)", "aten.slice.Tensor"),
    ("f32[4, 3]", "aten.cat([%x, %x])", "aten.cat.default"),
    ("f16[2, 3]", "aten._to_copy(%x, dtype=f16, memory_format=torch.contiguous_format)", "aten._to_copy.default"),
    ("f32[2, 3]", "aten.clamp(%x, None, 0.5)", "aten.clamp.default"),
    ("b8[2, 3]", "aten.gt(%x, 0)", "aten.gt.Scalar"),
    ("(f32[2], i64[2])", "aten.max(%x, 1)", "aten.max.dim"),
    ("c", "aten.einsum('ab,cb->ac', [%x, %x])", "aten.einsum.default"),
    ("f32[2, 3]", "aten.gelu(%x, approximate='tanh')", "aten.gelu.default"),
    ("f32[2, 3]", "prims.convert_element_type(%x, f32)", "prims.convert_element_type.default"),
    ("f32[4, 3]", "mobizo.expand(%x, 2, 0, 1)", "mobizo.expand.default"),
    ("c64[2, 2]", "aten._fft_r2c(%x, [1], 0, True)", "aten._fft_r2c.default"),
]


@pytest.mark.parametrize(("kind", "call", "target"), CALLS)
def test_what_may_stand_in_a_call(kind: str, call: str, target: str) -> None:
    kind = "f32[2, 2]" if kind == "c" else kind
    text = f"%x: f32[2, 3] = batch 'x'\n\n%y: {kind} = {call}\n\nreturn %y: {kind} = logits\n"
    ir = mz.parse(text)
    assert to_text(ir) == text
    assert str(ir.output_node("logits").target) == target


def test_an_overload_is_written_where_the_arguments_mean_another() -> None:
    ir = mz.parse("%x: f32[2] = batch 'x'\n%y: f32[2] = aten.mul(%x, 2)\nreturn %y: f32[2] = logits")
    node = ir.output_node("logits")
    node.target = torch.ops.aten.mul.Scalar
    assert "%y: f32[2] = aten.mul.Scalar(%x, 2)\n" in to_text(ir)


def test_origin_pass_and_facts() -> None:
    text = """
        %x: f32[2, 3] = batch 'x'  # | | batch 0
        %b: f32[4, 3] = adapter 'layer.lora_B.weight'  # | lift-adapter
        %z: f32[2, 4, 3] = mobizo.noise(%s, 1, 2, [4, 3], 'gaussian')  # | insert-noise | noise of layer.lora_B.weight
        %y: f32[2, 4] = aten.linear(%x, %b)  # layer | | expanded, batch 0 outer 2
        %v: f32[2, 4] = aten.relu(%y)  # layer.act
        %w: f32[2, 4] = aten.neg(%v)  # | decompose | batch lost
        return %w: f32[2, 4] = logits
    """.replace("%b:", "%s: i64[1] = seed\n%b:")
    ir = mz.parse(text)
    x, _, b, z, y, v, w = list(ir.graph.nodes)[:-1]
    assert role(b) == Input("adapter", "layer.lora_B.weight")
    assert (facts(x).layout, facts(y).layout, facts(w).layout) == (Layout(0), Layout(0, 2), None)
    assert (facts(z).noise_of, facts(y).expanded, facts(v).expanded) == ("layer.lora_B.weight", True, False)
    assert [facts(n).made_by for n in (x, b, z, y, w)] == [
        "capture", "lift-adapter", "insert-noise", "capture", "decompose",
    ]  # fmt: skip
    shown = [re.sub(r" {2,}# ", "  # ", line.strip()) for line in to_text(ir, facts=True).splitlines() if line]
    assert shown == [line.strip() for line in text.splitlines() if line.strip()]
    assert "expanded" not in to_text(ir)
    assert "  # layer\n" in to_text(ir)
    assert "  # | decompose\n" in to_text(ir)


def test_lines_of_the_model_stand_above_the_nodes_that_come_from_them() -> None:
    text = """
        # A comment that is no line of a model.
        %x: f32[2, 3] = batch 'x'
        %v: f32[2, 3] = aten.neg(%x)
        # tests/model.py:12 in forward: y = act(x[0:2])  # no line of the model
        %y: f32[2, 3] = aten.relu(%v)  # act
        %z: f32[2, 3] = aten.neg(%y)
        # <stdin>:3 in <lambda>
        %u: f32[2, 3] = aten.neg(%z)
        # no line of the model
        %w: f32[2, 3] = aten.neg(%u)  # | decompose
        return %w: f32[2, 3] = logits
    """
    ir = mz.parse(text)
    assert contract.lines(to_text(ir, sources=True)) == contract.lines(text)[1:]
    assert contract.lines(to_text(ir)) == [line for line in contract.lines(text) if not line.startswith("#")]
    y = next(node for node in ir.graph.nodes if node.name == "y")
    assert "in module 'act', model.py, line 12, in forward" in describe(y)


def test_the_line_of_a_node_is_the_users_where_torch_computed_it(compiled: Any) -> None:
    program = compiled("mlp")[0]
    head = next(node for node in program.captured.graph.nodes if node.name == "linear_6")
    assert "torch/nn/modules/linear.py" in head.meta["stack_trace"]
    assert "in module 'head', models.py, line " in describe(head)
    assert "\n# tests/models.py:" in program.text(sources=True)


def test_values_come_from_the_state() -> None:
    text = "%w: f32[2] = parameter 'a.w'\n%c: i64[2] = constant 'c'\nreturn %w: f32[2] = logits"
    value, count = torch.tensor([1.0, 2.0]), torch.tensor([5, 6])
    ir = mz.parse(text, {"a.w": value, "c": count})
    assert isinstance(ir.state["a.w"], nn.Parameter)
    assert not ir.state["a.w"].requires_grad
    assert torch.equal(ir.run({})["logits"], value)
    assert torch.equal(ir.state["c"], count)


def test_without_a_state_values_are_seeded_by_name() -> None:
    one = mz.parse("%w: f32[2] = parameter 'w'\nreturn %w: f32[2] = logits")
    other = mz.parse("%v: f32[3] = buffer 'v'\n%w: f32[2] = buffer 'w'\nreturn %w: f32[2] = logits")
    assert torch.equal(one.state["w"], other.state["w"])
    assert torch.equal(one.state["w"], seeded_value("w", torch.float32, (2,)))
    assert not torch.equal(one.state["w"], other.state["v"][:2])
    assert set(seeded_value("n", torch.int64, (50,)).tolist()) == {0, 1}


X = "%x: f32[2, 3] = batch 'x'\n"
R = "\nreturn %x: f32[2, 3] = logits"
REFUSED = {
    "no line": (f"{X}x = y{R}", 2, "expected '%name: type = ...' or 'return %name: type = role', found 'x = y'"),
    "unknown node": (f"{X}%y: f32[2, 3] = aten.relu(%z){R}", 2, "%z is not defined above"),
    "unknown output": ("return %x: f32[2] = loss", 1, "%x is not defined above"),
    "wrong type": (f"{X}\n%y: f32[3, 2] = aten.relu(%x){R}", 3, r"%y is f32\[2, 3\], the text says f32\[3, 2\]"),
    "wrong type of an output": (f"{X}return %x: f16[2, 3] = loss", 2, r"the text says f16\[2, 3\]"),
    "twice": (X + X + R, 2, "%x is defined twice"),
    "taken by Python": (f"{X}%max: f32[2, 3] = aten.relu(%x){R}", 2, "%max can't be .* a free name is %max_1"),
    "no such operator": (f"{X}%y: f32[2, 3] = mine.relu(%x){R}", 2, "no operator 'mine.relu'; if a library"),
    "no such overload": (f"{X}%y: f32[2, 3] = aten.mul.Int(%x, 2){R}", 2, "no overload 'Int'; it has Tensor, Scalar"),
    "no overload fits": (f"{X}%y: f32[2, 3] = aten.mul(%x, 'a'){R}", 2, "no overload that takes these arguments"),
    "arguments": (f"{X}%y: f32[2, 3] = aten.bmm(%x, %x){R}", 2, "aten.bmm does not take these arguments: "),
    "no call": (f"{X}%y: f32[2, 3] = aten.relu(%x{R}", 2, "expected a call 'operator"),
    "no literal": (f"{X}%y: f32[2, 3] = aten.mul(%x, two){R}", 2, "expected %name, a number, .* found 'two'"),
    "no literal, but a call": (f"{X}%y: f32[2, 3] = aten.mul(%x, f(%x)){R}", 2, r"found 'f\(%x\)'"),
    "no dtype": ("%x: f33[2] = batch 'x'", 1, r"the type of an input is a dtype and a shape.* found 'f33\[2\]'"),
    "no role": (f"{X}%y: f32[2] = weights 'y'{R}", 2, "no input is a 'weights'; expected parameter, buffer, "),
    "no name": ("%x: f32[2] = batch x", 1, "expected a role, with a quoted name .* found 'batch x'"),
    "input after a call": (f"{X}%y: f32[2, 3] = aten.relu(%x)\n%z: f32[1] = eps", 3, "%z stands below a call"),
    "no output": (f"{X}\n", 2, "the text ends without an output"),
    "nothing": ("", 1, "the text ends without an output"),
    "comment": (f"{X}%y: f32[2, 3] = aten.relu(%x)  # a | b | expanded | c{R}", 2, "'# module | pass | facts'"),
    "fact": (f"{X}%y: f32[2, 3] = aten.relu(%x)  # a | b | widened{R}", 2, "expected expanded, .* found 'widened'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    text, line, message = REFUSED[what]
    with pytest.raises(mz.ParseError, match=rf"line {line}: .*{message}") as caught:
        mz.parse(text)
    assert caught.value.line == line


def test_a_state_that_does_not_fit_is_refused() -> None:
    text = "%w: f32[2] = parameter 'w'\nreturn %w: f32[2] = logits"
    with pytest.raises(mz.ParseError, match=r"line 1: 'w' is missing in state=, which has nothing"):
        mz.parse(text, {})
    with pytest.raises(mz.ParseError, match=r"line 1: 'w' is f32\[3\] in state=, other than in the text"):
        mz.parse(text, {"w": torch.ones(3)})
