"""The hash that tells programs apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg


def program_id(
    programs: Mapping[str, ExportedProgram], weights_sha256: str, target: str, options: Mapping[str, str]
) -> str:
    """SHA-256 over every method's graph (operators, arguments, shapes, dtypes, constants), the weights, the target and
    its options.

    Node names do not enter, so that renaming changes nothing; buffers and constants enter by their bytes, weights by
    `weights_sha256`.
    """
    digest = hashlib.sha256()
    digest.update(f"target {target}\nweights {weights_sha256}\n".encode())
    for name in sorted(options):
        digest.update(f"option {name} {options[name]}\n".encode())
    for name in sorted(programs):
        digest.update(f"method {name}\n".encode())
        for line in _lines(programs[name]):
            digest.update(line.encode())
            digest.update(b"\n")
    return digest.hexdigest()


def _lines(program: ExportedProgram) -> list[str]:
    index: dict[Node, int] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    lines: list[str] = []
    for node in program.graph.nodes:
        index[node] = len(index)
        described = map_arg((node.args, dict(node.kwargs)), lambda n: f"%{index[n]}")
        origin = ""
        if node.op == "placeholder":
            spec = specs[node.name]
            origin = f" {spec.kind.name} {spec.target or ''}"
            if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                origin += f" {_content(program, str(spec.target))}"
        lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''}{origin} {described} {_type(node)}")
    return lines


def _content(program: ExportedProgram, fqn: str) -> str:
    value: Any = program.state_dict.get(fqn, program.constants.get(fqn))
    if not isinstance(value, torch.Tensor):
        return ""
    return hashlib.sha256(raw_bytes(value)).hexdigest()


def raw_bytes(value: torch.Tensor) -> memoryview:
    """A tensor's elements in row-major order, whatever its dtype and strides."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _type(node: Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
