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

        All are written aside first and then moved into place, the program last: if one can't be written, none is there.

        Raises:
            OSError: the folder cannot be written to.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = self.manifest_json().encode()
        files: dict[Path, Callable[[BinaryIO], object]] = {target.with_suffix(".json"): lambda file: file.write(text)}
        if self.weights is not None:
            files[target.with_suffix(".ptd")] = self.weights.write_to_file
        _write({**files, target: self.executorch.write_to_file})
        return target

    def manifest_json(self) -> str:
        """The manifest as it stands in the program, in JSON."""
        return self.manifest.model_dump_json(indent=2)


def _write(files: Mapping[Path, Callable[[BinaryIO], object]]) -> None:
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
        for path, temporary in aside.items():
            temporary.replace(path)
    finally:
        for temporary in aside.values():
            temporary.unlink(missing_ok=True)
