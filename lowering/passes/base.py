"""What a legalisation pass is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch.export import ExportedProgram

from lowering.editor import ProgramEditor


@runtime_checkable
class LegalisationPass(Protocol):
    """One rewrite. Options are the fields of a frozen dataclass; running it twice changes nothing more."""

    @property
    def name(self) -> str:
        """Kebab-case name, as shown in the report."""
        ...

    def __call__(self, editor: ProgramEditor) -> int:
        """Rewrite `editor.graph` in place; the number of places rewritten."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """How often one pass fired on one method."""

    name: str
    rewrites: int


def run_passes(
    program: ExportedProgram, passes: Sequence[LegalisationPass]
) -> tuple[ExportedProgram, tuple[PassRecord, ...]]:
    """Run `passes` in order on a copy of `program`'s graph; the new program and one record per pass."""
    editor = ProgramEditor(program)
    records: list[PassRecord] = []
    for each in passes:
        rewrites = each(editor)
        editor.clean()
        records.append(PassRecord(each.name, rewrites))
    return editor.finish(), tuple(records)
