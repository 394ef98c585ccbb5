"""A lowered program: what `lower` gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowering.errors import LoweringError
from lowering.report import Report
from lowering.saving import save
from runtime_driver.format import ProgramFileSpec
from runtime_driver.format.footer import FileHash, write_with_footer

if TYPE_CHECKING:
    import networkx

    from runtime_driver.format import Manifest


@dataclass(frozen=True)
class Lowered:
    """An ExecuTorch program with the methods step, apply, loss, logits, initial_adapter and its manifest inside.

    `weights`: the weights file's bytes, as ExecuTorch's `Cord`; None if weights are inside or in an existing file.
    `recorded`: whether `executorch` keeps an ETRecord.
    """

    manifest: Manifest
    report: Report
    executorch: Any = field(repr=False)
    graphs: Mapping[str, networkx.DiGraph] = field(repr=False)
    weights: Any = field(default=None, repr=False)
    recorded: bool = field(default=False, repr=False)

    def to_networkx(self, method: str = "step") -> networkx.DiGraph:
        """One method as a graph: attributes op, shape, dtype, origin, flops, delegate (number of the call, or None),
        rule and reason (for which no delegate took the node, or None); nodes inside of delegate calls are there one by
        one.

        Raises:
            LoweringError: no such method.
        """
        if method not in self.graphs:
            raise LoweringError(f"no method '{method}'; this program has {', '.join(self.graphs)}")
        return self.graphs[method].copy()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the program to `path`, the manifest beside it (`model.pte` -> `model.json`), and the weights
        (`model.ptd`) if they are in a file of their own that did not exist before; the program's path.

        The program ends in a footer with its SHA-256 (`runtime_driver.format.footer`); the manifest beside it
        has the SHA-256 of the whole file. At every moment, also if the process is killed, the old program or the new
        one is whole; see `lowering.saving`.

        Raises:
            OutputNotOurs: one of the names is taken by something that this package did not write.
            OSError: the folder cannot be written to; what was there is as it was.
        """
        target = Path(path)
        hashes: list[FileHash] = []
        weights = None if self.weights is None else self.weights.write_to_file
        save(
            target,
            lambda file: hashes.append(write_with_footer(file, self.executorch.write_to_file)),
            lambda: self._beside(hashes[0]),
            weights,
            "" if self.manifest.weights_file is None else self.manifest.weights_file.sha256,
        )
        return target

    def save_etrecord(self, path: str | os.PathLike[str], method: str = "step") -> Path:
        """Write an ETRecord of one method, weights included, for ExecuTorch's Inspector; the file's path.

        With it, the Inspector says which operators, modules and lines of the model an event of an ETDump belongs to. It
        expects one method with the name forward, and that is what is in the file.

        Raises:
            LoweringError: no such method, or the program was not lowered with ``etrecord=True``.
            OSError: the file cannot be written.
        """
        from lowering.executorch_compat.etrecord import save_etrecord

        if method not in self.graphs:
            raise LoweringError(f"no method '{method}'; this program has {', '.join(self.graphs)}")
        if not self.recorded:
            raise LoweringError("there is no ETRecord to save: pass etrecord=True to lower")
        save_etrecord(self.executorch, method, Path(path))
        return Path(path)

    def _beside(self, program: FileHash) -> bytes:
        spec = ProgramFileSpec(sha256=program.sha256, bytes=program.bytes)
        return self.manifest.model_copy(update={"program_file": spec}).model_dump_json(indent=2).encode()

    def manifest_json(self) -> str:
        """The manifest as it stands in the program, in JSON."""
        return self.manifest.model_dump_json(indent=2)
