"""The text of a program reads back into the same program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.parse import parse
from mobizo_passes.graph.text import to_text
from mobizo_passes.program import TrainingProgram


def check_text(ir: Ir, values: Mapping[str, Tensor] | None = None) -> None:
    """Print, parse and print again: the same text; and, if values of all inputs are given, the same bits in a run."""
    text = to_text(ir, facts=True, sources=True)
    again = parse(text, ir.state)
    assert to_text(again, facts=True, sources=True) == text
    if values is not None:
        want, got = ir.run(values), again.run(values)
        assert list(got) == list(want)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)


def values_of(program: TrainingProgram) -> dict[str, Tensor]:
    """Values of all inputs of a program's step."""
    scalars = {"seed": torch.tensor([3]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}
    return {**program.initial_adapter(), **program.initial_optimizer(), **program.example_batch(), **scalars}
