"""The contract of every legalisation pass, on programs written down as text in `programs/`.

A file has a pass's name. ``BEFORE`` and ``AFTER`` show a rewrite, which must keep the numbers and leave nothing to do
for a second run; ``LEFT ALONE: why`` is a near miss. Under MOBIZO_UPDATE_GOLDEN=1 what stands under ``AFTER`` is
written anew.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._export.verifier import load_verifier
from torch.export import ExportedProgram

import lowering.passes
from lowering.passes.base import LegalisationPass, run_passes
from mobizo_passes import parse
from mobizo_passes.graph.ir import Input, Ir
from mobizo_passes.graph.text import op_name
from tests.passes.contract import lines, to_text, values_of

PROGRAMS = Path(__file__).parent / "programs"
# These change no graph, or need more than a graph; they have tests of their own.
ELSEWHERE = {"tag-weights", "quantize-body"}
# What is computed in another precision afterwards agrees as far as the coarser one goes.
TOLERANCE = {"widen-halves": 2e-3}
SECTION = re.compile(r"^(BEFORE|AFTER|LEFT ALONE: .+)$", re.MULTILINE)


def passes() -> dict[str, Callable[[], LegalisationPass]]:
    """The classes of all passes, by their name."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(lowering.passes.__path__, "lowering.passes."):
        for value in vars(importlib.import_module(module.name)).values():
            name = getattr(value, "name", None)
            if inspect.isclass(value) and value.__module__ == module.name and isinstance(name, str):
                found[name] = value
    return found


@dataclass(frozen=True)
class Shown:
    """One program of a file, and what becomes of it: None for nothing."""

    name: str
    title: str
    before: str
    after: str | None

    def __str__(self) -> str:
        return f"{self.name}-{re.sub('[^a-z0-9]+', '-', self.title.lower())}"


def shown(path: Path) -> Iterator[Shown]:
    _, *parts = SECTION.split(path.read_text(encoding="utf-8"))
    sections = list(zip(parts[::2], parts[1::2], strict=True))
    for place, (title, text) in enumerate(sections):
        if title == "BEFORE":
            yield Shown(path.stem, f"rewrite {place // 2}", text, sections[place + 1][1])
        elif title != "AFTER":
            yield Shown(path.stem, title, text, None)


ALL = [one for path in sorted(PROGRAMS.glob("*.txt")) for one in shown(path)]


def exported(text: str) -> tuple[Ir, ExportedProgram]:
    ir = parse(text)
    return ir, ir.to_exported_program(load_verifier("ATEN"))


def read(program: ExportedProgram, like: Ir) -> Ir:
    """A lowered program as an `Ir`: inputs as they were, then new constants; calls named for their operators."""
    known = {n.name: n.meta["input"] for n in like.placeholders()}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    graph, values, state = fx.Graph(), {}, {}
    placeholders = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    order = [name for name in known if name in placeholders]
    stored = {**program.state_dict, **program.constants}
    new = 0
    for name in [*order, *(name for name in placeholders if name not in known)]:
        spec, target = known.get(name), specs[name].target
        if spec is None:
            spec, new = Input("constant", f"new_{new}"), new + 1
        values[placeholders[name]] = node = graph.placeholder(name if name in known else spec.name)
        node.meta.update(val=placeholders[name].meta["val"], input=spec)
        if target is not None:
            state[spec.name] = stored[target]
    for old in program.graph.nodes:
        if old.op == "call_function":
            args, kwargs = fx.map_arg((old.args, old.kwargs), values.__getitem__)
            name = op_name(old).rpartition(".")[2]
            values[old] = node = graph.create_node("call_function", old.target, args, kwargs, name)
            node.meta["val"] = old.meta["val"]
    results: Any = program.graph.output_node().args[0]
    graph.output(tuple(values[result] for result in results))
    return Ir(graph, state, like.outputs, like.fake)


@pytest.mark.parametrize("one", ALL, ids=str)
def test_contract(one: Shown) -> None:
    kind = passes()[one.name]
    like, before = exported(one.before)
    after, (record,) = run_passes(before, (kind(),))
    found = read(after, like)
    if one.after is None:
        assert record.rewrites == 0
        assert lines(to_text(found)) == lines(to_text(read(before, like)))
        return
    assert record.rewrites > 0
    if not os.environ.get("MOBIZO_UPDATE_GOLDEN"):
        assert lines(to_text(found)) == lines(one.after)
    else:
        path = PROGRAMS / f"{one.name}.txt"
        path.write_text(path.read_text().replace(f"AFTER{one.after}", f"AFTER\n{to_text(found)}\n", 1))
    values = values_of(like)
    expected, got = like.run(values), found.run(values)
    assert list(got) == list(expected)
    tolerance = TOLERANCE.get(one.name, 1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=10 * tolerance, atol=tolerance)
    again, (second,) = run_passes(after, (kind(),))
    assert second.rewrites == 0
    assert lines(to_text(read(again, found))) == lines(to_text(read(after, found)))


def test_every_pass_has_programs() -> None:
    """At least one rewrite, and one near miss."""
    names = set(passes()) - ELSEWHERE
    assert {one.name for one in ALL if one.after is not None} == names
    assert {one.name for one in ALL if one.after is None} == names
