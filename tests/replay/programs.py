"""What is replayed: every program of the coverage table, as text in which nodes have numbers instead of names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.node import map_arg

import lowering
import mobizo_passes as mz
from lowering.stages import legalize
from lowering.targets import get_target
from tests.coverage.catalogue import ROWS
from tests.coverage.row import Row

# Methods that are legalized for a target, without ExecuTorch's part of the lowering.
LEGALIZED = (("xnnpack", ("step", "logits")), ("vulkan", ("step",)))
# Rows that are lowered whole, and for which targets: a decoder, an encoder, a convolution, a model written by hand.
LOWERED = {
    "llama-peft-q-v": ("xnnpack",),
    "convnet-peft-conv2d": ("portable",),
    "mlp-own-names": ("xnnpack", "vulkan"),
}


def replay(name: str) -> dict[str, str]:
    """Name and text of every program of the row called `name`."""
    row = next(row for row in ROWS if str(row) == name)
    return {f"{row} {program}": text for program, text in texts(row)}


def texts(row: Row) -> Iterator[tuple[str, str]]:
    """(name, text) of each program of a row: readable, in core ATen, legalized, lowered; the refusal if it is one."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        program = row.transform(row.build(), row.inputs())
    except mz.MobizoError as error:
        yield "refused", type(error).__name__
        return
    yield "step readable", structure(program.exported_program)
    cores = {method: program.core(method) for method in program.methods}
    for method, core in cores.items():
        yield f"{method} core", structure(core)
    yield "internal step core", structure(program.core("step", "internal"))
    for target, methods in LEGALIZED:
        for method in methods:
            if method in cores:
                yield f"{method} {target}", structure(legalize(method, cores[method], get_target(target), None).program)
    for target in LOWERED.get(str(row), ()):
        lowered = lowering.lower(program, target=target, check=False)
        yield f"lowered {target}", _lowered(lowered)


def digest(text: str) -> str:
    """The first 16 digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def structure(program: ExportedProgram) -> str:
    """A graph without the names of its nodes: one line per call, with operator, arguments, dtype and shape.

    Inputs of the caller appear by their place, weights and constants by the hash of their contents.
    """
    shown: dict[fx.Node, str] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    lines: list[str] = []
    inputs = 0
    for node in program.graph.nodes:
        kind = _type(node.meta.get("val"))
        if node.op == "placeholder":
            content = _content(program, specs[node.name].target)
            shown[node] = content or f"input{inputs}"
            inputs += not content
            if not content:
                lines.append(f"{shown[node]}: {kind}")
            continue
        shown[node] = f"%{len(lines)}"
        arguments = map_arg((node.args, dict(node.kwargs)), lambda n: shown[n])
        target = node.target if node.op == "call_function" else node.op
        lines.append(f"{shown[node]}: {kind} = {target} {_plain(arguments)}")
    return "\n".join(lines) + "\n"


def _lowered(lowered: lowering.Lowered) -> str:
    """Calls of each lowered method with their operators, shapes and delegate calls."""
    lines: list[str] = []
    for method, graph in lowered.graphs.items():
        number = {name: place for place, name in enumerate(graph.nodes)}
        for name, facts in graph.nodes(data=True):
            sources = sorted(number[source] for source in graph.predecessors(name))
            what = (facts["op"], facts["dtype"], facts["shape"], facts["delegate"], facts["flops"])
            lines.append(f"{method} %{number[name]} = {' '.join(map(str, what))} {sources}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_plain(each)}' for key, each in sorted(value.items()))}}}"
    return str(value)


def _type(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_type, value))})"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _content(program: ExportedProgram, fqn: str | None) -> str:
    value: Any = None if fqn is None else program.state_dict.get(fqn, program.constants.get(fqn))
    if not isinstance(value, Tensor):
        return ""
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{_type(value)}#{hashlib.sha256(data).hexdigest()[:16]}"
