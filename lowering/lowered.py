"""A lowered program: what `lower` gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lowering.errors import LoweringError
from lowering.report import Report
from mobizo_manifest import ProgramFileSpec
from mobizo_manifest.seal import FileHash, write_sealed

if TYPE_CHECKING:
    import networkx

    from mobizo_manifest import Manifest


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program with the methods step, apply, loss, logits, initial_adapter and its manifest inside.

    `weights`: the weights file's bytes, as ExecuTorch's `Cord`; None if weights are inside or in an existing file.
    """

    manifest: Manifest
    report: Report
    executorch: Any = field(repr=False)
    graphs: Mapping[str, networkx.DiGraph] = field(repr=False)
    weights: Any = field(default=None, repr=False)

    def to_networkx(self, method: str = "step") -> networkx.DiGraph:
        """One method as a graph: attributes op, shape, dtype, origin, flops, delegate (number of the call, or None)
        and reason (why no delegate took the node, or None); nodes inside of delegate calls are there one by one.

        Raises:
            LoweringError: no such method.
        """
        if method not in self.graphs:
            raise LoweringError(f"no method '{method}'; this program has {', '.join(self.graphs)}")
        return self.graphs[method].copy()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the program to `path`, the manifest beside it (`model.pte` -> `model.json`), and the weights
        (`model.ptd`) if they are in a file of their own that did not exist before; the program's path.

        The program ends in a seal with its SHA-256 (`mobizo_manifest.seal`); the manifest beside it has that of the
        whole file.

        All are written aside first and then moved into place, the program last: if one can't be written, none is there.

        Raises:
            OSError: the folder cannot be written to.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        seals: list[FileHash] = []
        # Written in this order, as the manifest beside the program states the program's hash.
        files: dict[Path, Callable[[BinaryIO], object]] = {
            target: lambda file: seals.append(write_sealed(file, self.executorch.write_to_file)),
            target.with_suffix(".json"): lambda file: file.write(self._beside(seals[0])),
        }
        if self.weights is not None:
            files[target.with_suffix(".ptd")] = self.weights.write_to_file
        _write(files, last=target)
        return target

    def _beside(self, program: FileHash) -> bytes:
        spec = ProgramFileSpec(sha256=program.sha256, bytes=program.bytes)
        return self.manifest.model_copy(update={"program_file": spec}).model_dump_json(indent=2).encode()

    def manifest_json(self) -> str:
        """The manifest as it stands in the program, in JSON."""
        return self.manifest.model_dump_json(indent=2)


def _write(files: Mapping[Path, Callable[[BinaryIO], object]], last: Path) -> None:
    aside: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            aside[path] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            aside[path].chmod(0o644)
        for path in sorted(aside, key=lambda each: each == last):
            aside[path].replace(path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
