"""Weights in a file of their own (.ptd), outside of the program.

Every weight is stored under a name made from its bytes, and in the order of the names: programs of one model have the
same names for the same weights, and write the same file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from executorch.exir.tensor_layout import TensorLayout
from torch.export import ExportedProgram
from torch.fx import Node

from lowering.errors import WeightsFileUnusable
from lowering.executorch_compat.tags import TAG, is_tagged, untag
from lowering.executorch_compat.weights import Cord, DelegatedWeights, Weight, entries, promised_bytes, serialized
from runtime_driver.format import WeightsFileSpec


@dataclass(frozen=True)
class WeightsFile:
    """The weights file of a program; `content` is None where the program uses one that exists already."""

    spec: WeightsFileSpec
    content: Cord | None = field(default=None, repr=False)


def check_weights_file(path: str | os.PathLike[str]) -> None:
    """Raise `WeightsFileUnusable` for a file that `lower` could not use; reads it whole."""
    _read(Path(path))


def move_weights(edge: Any, existing: str | os.PathLike[str] | None = None) -> WeightsFile:
    """Take the marked weights out of partitioned methods; `edge`, ExecuTorch's edge manager, is changed in place.

    With `existing`, only those that are in this file: the others stay in the program.

    Raises:
        WeightsFileUnusable: `existing` cannot be read, is no .ptd, is damaged, or has none of the weights.
    """
    outside: dict[str, Weight] = {}
    readers: list[tuple[Node, str]] = []
    for name in edge.methods:
        for node, key, weight in _name_by_content(edge.exported_program(name)):
            outside[key] = weight
            readers.append((node, key))
    delegated = DelegatedWeights(edge, TAG)
    inside = delegated.found()  # Their names are hashes of their bytes already.
    outside |= inside
    if existing is None:
        content = serialized(outside, TAG)
        return WeightsFile(_spec(content, None), content)
    path = Path(existing)
    stored, spec = _read(path)
    kept = _kept_outside(path, outside, stored)
    for node, key in readers:
        if key not in kept:
            untag(node)
    delegated.move_inside(inside.keys() - kept)
    return WeightsFile(spec)


def _name_by_content(program: ExportedProgram) -> list[tuple[Node, str, Weight]]:
    """Rename the marked constants that stand outside of delegates after dtype, shape and bytes.

    Names are all that ties a program to its weights file, and those of folded constants differ from method to method.
    """
    specs = program.graph_signature.input_specs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder" and is_tagged(node)}
    found: list[tuple[Node, str, Weight]] = []
    for index, spec in enumerate(specs):
        node = nodes.get(spec.arg.name)
        value = program.state_dict.get(str(spec.target))
        if node is None:
            continue
        if value is None or not value.is_contiguous() or not value.numel():
            untag(node)
            continue
        data = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
        key = f"{hashlib.sha256(data).hexdigest()} {kind}"
        program.state_dict[key] = value
        # The specs may be shared with the program that was partitioned: put a new one in place.
        specs[index] = type(spec)(spec.kind, spec.arg, key, spec.persistent)
        found.append((node, key, Weight(data, layout=TensorLayout.from_tensor(value))))
    return found


def _kept_outside(path: Path, weights: Mapping[str, Weight], stored: Mapping[str, bytes]) -> set[str]:
    kept = {key for key in weights if key in stored}
    damaged = sorted(key for key in kept if stored[key] != weights[key].data)
    if damaged:
        raise WeightsFileUnusable(
            path, f"is damaged: the bytes of entry {damaged[0]!r} are not those that it is named for"
        )
    if not kept:
        raise WeightsFileUnusable(path, f"has none of this program's {len(weights)} weights")
    return kept


def _read(path: Path) -> tuple[dict[str, bytes], WeightsFileSpec]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsFileUnusable(path, f"cannot be read ({error.strerror})") from error
    needed = promised_bytes(data)
    if needed is None:
        raise WeightsFileUnusable(path, "is not a .ptd file")
    if len(data) < needed:
        raise WeightsFileUnusable(path, f"is truncated: its header promises {needed} bytes, it has {len(data)}")
    return entries(data), _spec(Cord(data), path.name)


class _Digest:
    """A file that only hashes and counts."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return len(data)


def _spec(content: Cord, file: str | None) -> WeightsFileSpec:
    digest = _Digest()
    content.write_to_file(digest)  # pyright: ignore[reportArgumentType]
    return WeightsFileSpec(file=file, sha256=digest.sha256.hexdigest(), bytes=digest.bytes)
