"""What every pass test needs: export, run passes, compare, count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from lowering.executorch_compat.programs import rewritten
from mobizo_passes.graph.operators import overload_name


@dataclass(frozen=True)
class Rewritten:
    before: ExportedProgram
    after: ExportedProgram
    rewrites: dict[str, int]
    error: float

    def ops(self) -> Counter[str]:
        return ops_of(self.after)


class Fn(torch.nn.Module):
    """A function as a module, with buffers a, b, ... for `self`-less access."""

    def __init__(self, fn, **buffers) -> None:
        super().__init__()
        self.fn = fn
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args):
        return self.fn(self, *args)


def export(module: torch.nn.Module, args: tuple) -> ExportedProgram:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(module.eval(), args).run_decompositions({})


def rewrite(module: torch.nn.Module, args: tuple, *passes) -> Rewritten:
    """Run the passes; checks that numbers agree, that shapes and dtypes do, and that a second run changes nothing."""
    before = export(module, args)
    after, records = rewritten(before, passes)
    with torch.no_grad():
        expected, found = before.module()(*args), after.module()(*args)
    expected, found = _flat(expected), _flat(found)
    assert [(e.shape, e.dtype) for e in expected] == [(f.shape, f.dtype) for f in found]
    pairs = zip(expected, found, strict=True)
    error = max(float((e.double() - f.double()).abs().max() / e.double().abs().max().clamp_min(1e-9)) for e, f in pairs)
    again, second = rewritten(after, passes)
    assert len(passes) > 1 or second[0].rewrites == 0, second
    assert ops_of(again) == ops_of(after)
    return Rewritten(before, after, {r.name: r.rewrites for r in records}, error)


def ops_of(program: ExportedProgram) -> Counter[str]:
    names = (overload_name(n) for n in program.graph.nodes if n.op == "call_function")
    counts = Counter(name.removeprefix("aten.").split(".")[0] for name in names)
    del counts["_assert_tensor_metadata"]  # export's own checks, which compute nothing
    return counts


def _flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)
