"""Fixtures of the compiler's tests: compiled programs made once per run, golden texts, quiet libraries."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import networkx
import pytest
from torch import nn

import mobizo_passes as mz
from tests.captures import captured_once
from tests.models import case

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def _built(name: str) -> tuple[nn.Module, Any]:
    wanted = case(name)
    return wanted.build(), wanted.inputs()


@functools.cache
def _compiled(name: str, **options: Any) -> tuple[mz.TrainingProgram, nn.Module, Any]:
    model, inputs = _built(name)
    # A copy of a capture may number its nodes otherwise; programs without options are made from scratch.
    with captured_once((name, options.get("loss"))) if options else nullcontext():
        return mz.transform(model, inputs, **{**case(name).options, **options}), model, inputs


@pytest.fixture(scope="session")
def compiled() -> Callable[..., tuple[mz.TrainingProgram, nn.Module, Any]]:
    """(program, model, inputs) of a case of `tests.models`, compiled once per name and options; do not change them."""
    return _compiled


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with tests/golden/<name>.txt, or rewrite it under MOBIZO_UPDATE_GOLDEN=1."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        assert "/" not in text, "golden texts hold no paths"
        if os.environ.get("MOBIZO_UPDATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: set MOBIZO_UPDATE_GOLDEN=1 and read what it writes"
        assert text == path.read_text(), f"{path.name} differs: read the change, then set MOBIZO_UPDATE_GOLDEN=1"

    return check


@pytest.fixture
def lowered() -> networkx.DiGraph:
    """A small graph as `lowered.to_networkx()` gives it: an input, a delegated node and one that is not."""
    graph = networkx.DiGraph(name="lowered")
    common = {"shape": [3, 5], "dtype": "float32", "origin": "model.norm", "flops": 0}
    graph.add_node("x", op="placeholder", **{**common, "origin": ""}, delegate=None, rule=None, reason=None)
    graph.add_node("call.mul", op="aten.mul.Tensor", **common, delegate=0, rule=None, reason=None)
    graph.add_node("topk", op="aten.topk.default", **common, delegate=None, rule="dtype", reason="no int64 kernels")
    graph.add_edges_from([("x", "call.mul"), ("call.mul", "topk")])
    return graph
