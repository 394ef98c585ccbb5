"""What a pass changed, node by node, with repetitions told once."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

# A node keeps its name when a pass changes it: nodes, not lines, are what is matched.
_NODE = re.compile(r"%(\w+): (.*?) = (.*)", re.DOTALL)
_CONTEXT = 1


@dataclass(frozen=True)
class _Line:
    """A line with its mark: " " context, "-" gone, "+" new, "~" another type only."""

    mark: str
    text: str
    number: int

    @property
    def element(self) -> str:
        """The element of a list of modules that the node comes from, as ``layers.3``; empty if from none."""
        # A parameter's name stands in quotes, a call's module in the comment.
        origin = self.text.rpartition("  # ")[2] if "  # " in self.text else self.text
        found = re.search(r"[A-Za-z_][\w.]*?\.\d+(?=[.\s'|]|$)", origin)
        return found[0] if found else ""

    @property
    def shape(self) -> str:
        """The line without what tells repetitions apart: positions in lists, numbers of nodes, ids of noise."""
        text = re.sub(r"%\w+", lambda m: re.sub(r"_\d+(?=_|$)", "_", m[0]).rstrip("_"), self.text)
        text = re.sub(r"(?<=[A-Za-z_]\.)\d+", "", text)
        return self.mark + re.sub(r"\b\d{6,}\b", "", text)


def graph_diff(before: str, after: str, name: str, *, width: int | None = None, everything: bool = False) -> str:
    """Return how two graph texts differ, one line a node; empty if they are equal.

    Marks: ``-`` a node before, ``+`` a node after, ``~`` a node of which only the type changed: before → after.
    Layers that changed as the layer above them did are counted, not repeated, unless `everything`; lines are cut to
    `width` characters if that is given.
    """
    if before == after:
        return ""
    parts = _parts(_hunks(_changes(_squeeze(before), _squeeze(after))))
    out = [f"--- before {name}", f"+++ after {name}"]
    out += [line.mark + line.text for _, lines in parts for line in lines] if everything else _folded(parts)
    return "\n".join(out if width is None else (fit(line, width) for line in out))


def fit(line: str, width: int) -> str:
    """Cut a line to `width` characters: first its module from the left, then its call from the right."""
    if len(line) <= width:
        return line
    code, mark, comment = line.partition("  # ")
    if mark:
        room = max(width - len(code) - 4, min(len(comment), 2 * width // 5 - 4))
        comment = mark + (comment if len(comment) <= room else f"…{comment[len(comment) - room + 1 :]}")
    room = width - len(comment)
    return (code if len(code) <= room else f"{code[: max(room - 1, 0)]}…") + comment


def _squeeze(text: str) -> list[str]:
    """The lines, without the padding that aligns comments: where they stand is no change."""
    return [re.sub(r" {2,}# ", "  # ", line) for line in text.splitlines() if line]


def _key(line: str) -> str:
    found = _NODE.match(line)
    return found[1] if found else line


def _changes(old: list[str], new: list[str]) -> list[_Line]:
    matcher = difflib.SequenceMatcher(None, [_key(line) for line in old], [_key(line) for line in new], autojunk=False)
    lines: list[_Line] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            for place, (was, now) in enumerate(zip(old[a:b], new[c:d], strict=True), a + 1):
                lines += _pair(was, now, place)
        else:
            lines += [_Line("-", line, place) for place, line in enumerate(old[a:b], a + 1)]
            lines += [_Line("+", line, b) for line in new[c:d]]
    return lines


def _pair(was: str, now: str, place: int) -> list[_Line]:
    if was == now:
        return [_Line(" ", was, place)]
    old, new = _NODE.match(was), _NODE.match(now)
    if old and new and old[3] == new[3]:
        return [_Line("~", f"%{old[1]}: {old[2]} → {new[2]} = {old[3]}", place)]
    return [_Line("-", was, place), _Line("+", now, place)]


def _hunks(lines: list[_Line]) -> list[list[_Line]]:
    """The changes with a little context, cut where nothing changed."""
    near = {
        place + off for place, line in enumerate(lines) if line.mark != " " for off in range(-_CONTEXT, _CONTEXT + 1)
    }
    hunks: list[list[_Line]] = []
    for place, line in enumerate(lines):
        if place in near:
            if not hunks or place - 1 not in near:
                hunks.append([])
            hunks[-1].append(line)
    return hunks


def _parts(hunks: list[list[_Line]]) -> list[tuple[str, list[_Line]]]:
    """All hunks with their headings, cut where the list element that the nodes come from changes."""
    parts: list[tuple[str, list[_Line]]] = []
    for hunk in hunks:
        heading = [_Line("@", f"@ line {hunk[0].number} @@", 0)]
        for line in hunk:
            if not parts or parts[-1][0] != line.element:
                parts.append((line.element, []))
            parts[-1][1].extend([*heading, line])
            heading = []
    return parts


def _folded(parts: list[tuple[str, list[_Line]]]) -> list[str]:
    """The lines of all parts; what a list element has in the same form as the one just above is counted."""
    out: list[str] = []
    previous: list[str] = []
    same: list[str] = []
    skipped = 0
    for element, lines in [*parts, ("", [])]:
        # Whether what did not change lies between two layers or inside them is no difference.
        shape = [line.shape for line in lines if line.mark != "@"]
        if element and shape == previous:
            same.append(element)
            skipped += len(lines)
            continue
        if same:
            names = same[0] if len(same) == 1 else f"{same[0]} to {same[-1].rpartition('.')[2]}"
            out.append(f"… {names}: the same, {skipped} lines")
            same, skipped = [], 0
        out += [line.mark + line.text for line in lines]
        previous = shape
    return out
