"""The contract of every legalization pass, on programs written down as text in `programs/`.

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

import lowering.passes
from mobizo_passes import parse
from mobizo_passes.graph.passes import Pass
from tests.passes.contract import lines, to_text, values_of

PROGRAMS = Path(__file__).parent / "programs"
# These change no graph, or need more than a graph; they have tests of their own.
ELSEWHERE = {"tag-weights", "quantize-body"}
# What is computed in another precision afterwards agrees as far as the coarser one goes.
TOLERANCE = {"widen-halves": 2e-3, "narrow-body": 2e-3}
SECTION = re.compile(r"^(BEFORE|AFTER|LEFT ALONE: .+)$", re.MULTILINE)


def passes() -> dict[str, Callable[[], Pass]]:
    """The classes of all passes, by their name."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(lowering.passes.__path__, "lowering.passes."):
        for value in vars(importlib.import_module(module.name)).values():
            name = getattr(value, "name", None)
            if (
                inspect.isclass(value)
                and issubclass(value, Pass)
                and value.__module__ == module.name
                and isinstance(name, str)
            ):
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


@pytest.mark.parametrize("one", ALL, ids=str)
def test_contract(one: Shown) -> None:
    run = passes()[one.name]()
    before = parse(one.before)
    after = before.clone()
    rewrites = run(after)
    if one.after is None:
        assert rewrites == 0
        assert lines(to_text(after)) == lines(to_text(before))
        return
    assert rewrites > 0
    if not os.environ.get("MOBIZO_UPDATE_GOLDEN"):
        assert lines(to_text(after)) == lines(one.after)
    else:
        path = PROGRAMS / f"{one.name}.txt"
        path.write_text(path.read_text().replace(f"AFTER{one.after}", f"AFTER\n{to_text(after)}\n", 1))
    values = values_of(before)
    expected, got = before.run(values), after.run(values)
    assert list(got) == list(expected)
    tolerance = TOLERANCE.get(one.name, 1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=10 * tolerance, atol=tolerance)
    text = to_text(after)
    assert to_text(parse(text)) == text
    assert run(after) == 0
    assert to_text(after) == text


def test_every_pass_has_programs() -> None:
    """At least one rewrite, and one near miss."""
    names = set(passes()) - ELSEWHERE
    assert {one.name for one in ALL if one.after is not None} == names
    assert {one.name for one in ALL if one.after is None} == names
