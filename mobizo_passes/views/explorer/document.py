"""What the explorer's page is told of a program: its text, facts of its nodes, and the texts between its passes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx

from mobizo_passes.graph.facts import source_frames
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import PassRecord
from mobizo_passes.graph.text import DTYPES, to_text
from mobizo_passes.views.explorer.columns import NodeData, columns_of, columns_of_rows

_DTYPE_NAMES = {str(dtype).removeprefix("torch."): short for dtype, short in DTYPES.items()}


@dataclass
class Document:
    """Collects graphs and passes; `json` is what the page reads. Equal lines and source frames are stored once."""

    title: str
    facts: Sequence[str]
    depth: int | None = None
    graphs: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    stages: list[list[int]] = field(default_factory=list)
    _lines: dict[str, int] = field(default_factory=dict)
    _frames: dict[str, int] = field(default_factory=dict)
    _stacks: dict[tuple[str, ...], int] = field(default_factory=dict)
    _sources: dict[str, int] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)

    def add_ir(self, name: str, ir: Ir, data: Mapping[str, NodeData], older: Ir | None = None) -> None:
        """Add a program's graph. The nodes of `older`, the captured graph, tell the source lines of earlier stages."""
        nodes = [*ir.placeholders(), *(n for n in ir.graph.nodes if n.op == "call_function")]
        for each in (*(older.graph.nodes if older is not None else ()), *nodes):
            self._add_source(each.name, source_frames(each))
        self._add(name, to_text(ir), [n.name for n in nodes], columns_of(nodes, data))

    def add_networkx(self, name: str, graph: networkx.DiGraph) -> None:
        """Add a graph with the attributes of `to_networkx`: that of a lowered program, or one of the user's own."""
        place = {each: number for number, each in enumerate(graph)}
        names = list(networkx.lexicographical_topological_sort(graph, key=place.__getitem__))
        lines, rows = [], []
        for each in names:
            row = graph.nodes[each]
            rows.append(row)
            lines.append(_line(each, row, graph.predecessors(each)))
            if row.get("source"):
                self._add_source(str(each), (row["source"],))
        self._add(name, "\n".join(lines), [str(each) for each in names], columns_of_rows(rows))

    def add_passes(self, history: Iterable[PassRecord]) -> None:
        """Add the passes with the texts before and after each."""
        for record in history:
            before, after = self._stage(record.before), self._stage(record.after)
            self.passes.append(
                {"name": record.name, "rewrites": record.rewrites, "doc": record.doc, "before": before, "after": after}
            )

    def json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "title": self.title,
            "facts": list(self.facts),
            "depth": self.depth,
            "lines": list(self._lines),
            "sources": {
                "frames": list(self._frames),
                "stacks": [[self._frames[frame] for frame in stack] for stack in self._stacks],
                "of": self._sources,
            },
            "graphs": self.graphs,
            "passes": self.passes,
            "stages": self.stages,
        }

    def _add(self, name: str, text: str, names: Sequence[str], overlays: Sequence[Mapping[str, Any]]) -> None:
        # The page numbers nodes by the lines of the text.
        order = {each: place for place, each in enumerate(names)}
        found = [order[each] for each in re.findall(r"^%([\w.]+): ", text, re.MULTILINE)]
        ordered = [{**each, "values": [each["values"][place] for place in found]} for each in overlays]
        self.graphs.append({"name": name, "lines": self._ranges(text), "overlays": ordered})

    def _stage(self, text: str) -> int:
        if text not in self._places:
            self._places[text] = len(self.stages)
            self.stages.append(self._ranges(text))
        return self._places[text]

    def _ranges(self, text: str) -> list[int]:
        """The text as first line and number of lines, again and again: most stages repeat what stood before."""
        ranges: list[int] = []
        for line in text.splitlines():
            if not line:
                continue
            place = self._lines.setdefault(re.sub(r" {2,}# ", "  # ", line), len(self._lines))
            if ranges and ranges[-2] + ranges[-1] == place:
                ranges[-1] += 1
            else:
                ranges += [place, 1]
        return ranges

    def _add_source(self, name: str, frames: tuple[str, ...]) -> None:
        if frames and name not in self._sources:
            for frame in frames:
                self._frames.setdefault(frame, len(self._frames))
            self._sources[name] = self._stacks.setdefault(frames, len(self._stacks))


def _line(name: Any, row: Mapping[str, Any], sources: Iterable[Any]) -> str:
    shape, dtype = row.get("shape"), str(row.get("dtype") or "")
    type_text = row.get("type") or (f"{_DTYPE_NAMES.get(dtype, dtype)}{list(shape)}" if shape is not None else "tuple")
    op = str(row.get("op", ""))
    if op == "placeholder":
        return f"%{name}: {type_text} = {row.get('role') or 'input'} '{name}'"
    call = f"%{name}: {type_text} = {op}({', '.join(f'%{each}' for each in sources)})"
    made_by = f" | {row['pass']}" if row.get("pass") else ""
    return f"{call}  # {row.get('origin') or ''}{made_by}"
