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

if TYPE_CHECKING:
    import networkx

    from mobizo_manifest import Manifest


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program with the methods step, apply, loss, logits, initial_adapter and its manifest inside."""

    manifest: Manifest
    report: Report
    executorch: Any = field(repr=False)
    graphs: Mapping[str, networkx.DiGraph] = field(repr=False)

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
        """Write the program to `path` and the manifest beside it (`model.pte` -> `model.json`); the program's path.

        Both are written aside and then moved into place, so neither is ever there in part.

        Raises:
            OSError: the folder cannot be written to.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = self.manifest_json().encode()
        _write(target.with_suffix(".json"), lambda file: file.write(text))
        _write(target, self.executorch.write_to_file)
        return target

    def manifest_json(self) -> str:
        """The manifest as it stands in the program, in JSON."""
        return self.manifest.model_dump_json(indent=2)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
