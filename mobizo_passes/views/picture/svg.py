"""A step program as an SVG: text stays text, nothing is loaded from outside."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from html import escape

import torch

from mobizo_passes.graph.facts import facts
from mobizo_passes.graph.text import op_name
from mobizo_passes.views.blocks import Block
from mobizo_passes.views.picture.layout import (
    CHIP,
    SMALL,
    TEXT,
    Box,
    chip_width,
    clip,
    lay_out,
    width,
)
from mobizo_passes.views.picture.view import Chip, View, view_of
from mobizo_passes.zo.scheme import Scheme

mobizo = torch.ops.mobizo

_STYLE = """
text { font-family: "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; fill: #1f2933; font-size: 12px }
.small { font-size: 10.5px } .tiny { font-size: 9.5px; fill: #52606d } .bold { font-weight: 600 }
.title { font-size: 18px; font-weight: 600 } .middle { text-anchor: middle } .end { text-anchor: end }
.once { fill: #eceff1; stroke: #90a4ae } .group { fill: #ffd8a6; stroke: #d97706 }
.frame { fill: #fff; stroke: #b8c4ce } .cold { fill: #f7f9fa } .warm { fill: #fff6ea; stroke: #e5b877 }
.step { fill: #e6e0f8; stroke: #7e57c2 }
.expand { fill: #fff; stroke: #c2410c; stroke-width: 1.8; stroke-dasharray: 4 2 }
.hot { fill: #c2410c } .glue { stroke-width: .8 } .flow { fill: none; stroke: #90a4ae; stroke-width: 1.3 }
.flow.wide { stroke: #d97706; stroke-width: 2.2 } .flow.noise { stroke: #7e57c2; stroke-width: 1.6 }
.block { cursor: default }
"""
_MARGIN, _PANEL, _TOP = 24.0, 250.0, 108.0
_ASIDE = ("adapter", "scalars", "noise", "perturb", "estimate", "update")

_FRAME = {"once": "frame cold", "per group": "frame warm", "both": "frame"}
_UNITS = ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


class Picture:
    """The drawing of one step program; `svg` is its text, `blocks` what each numbered block of it shows."""

    def __init__(self, root: Block, name: str, estimator: Scheme, sites: int, share: float, update: str = "") -> None:
        self.blocks: list[tuple[str, Block]] = []
        self._estimator = estimator
        self._update = update or "θ ← θ − η/q · Σ g·z"
        self._groups = groups = estimator.groups
        self._total, self._once = root.flops, root.flops - root.expanded_flops
        self._tangents = estimator.projected and not estimator.uses_epsilon
        self._parts: list[str] = []
        aside = {child.kind: child for child in root.children if child.kind in _ASIDE}
        view = view_of(root)
        _remove_aside(view)
        main = lay_out(view)
        column = max(main.w, 440.0)
        main.move(_MARGIN + (column - main.w) / 2, _TOP)
        right = _MARGIN + column + 56
        bottom = _TOP + main.h
        self._main(main)
        height = self._panel(main, aside, right, bottom)
        head = self._head(name, f"{estimator}: {groups} groups · {sites} LoRA site{'s' if sites > 1 else ''}", share)
        self._size = (max(right + _PANEL + 14, head) + _MARGIN, height + _MARGIN)
        self.name = name

    @property
    def svg(self) -> str:
        w, h = (f"{v:.0f}" for v in self._size)
        marks = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="{color}"/></marker>'
            for name, color in (("a0", "#90a4ae"), ("a1", "#d97706"), ("a2", "#7e57c2"))
        )
        both = "".join(
            f'<stop offset="{at}" stop-color="{color}"/>'
            for at, color in (("0", "#eceff1"), (".5", "#eceff1"), (".5", "#ffd8a6"), ("1", "#ffd8a6"))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">\n'
            f"<title>{escape(self.name)}: one training step</title>\n<style>{_STYLE}</style>\n"
            f'<defs>{marks}<linearGradient id="both">{both}</linearGradient></defs>\n'
            f'<rect width="{w}" height="{h}" fill="#fff"/>\n' + "\n".join(self._parts) + "\n</svg>\n"
        )

    # The model's forward -------------------------------------------------------------------------------------------

    def _main(self, box: Box) -> None:
        view = box.view
        if view.shape != "frame":
            self._leaf(box)
            return
        opened = bool(view.label)
        if opened:
            self._open(view.label, view.run)
            self._rect(box.x, box.y, box.w, box.h, _FRAME[view.block.computed], 8)
            self._text(box.x + 10, box.y + 16, view.label, "bold")
            if len(view.run) > 1:
                self._text(box.x + 18 + 1.1 * width(view.label, TEXT), box.y + 16, f"× {len(view.run)} layers", "bold")
            # Shares inside are those of the one layer that is drawn.
            together = f"all {len(view.run)}: " if len(view.run) > 1 else ""
            self._text(box.x + box.w - 10, box.y + 16, together + self._cost(view.run), "small end")
            self._parts.append("</g>")
        for (a, b), path in zip(view.edges, box.paths, strict=True):
            self._flow(path, box.down, "wide" if _carries_groups(view.children[a], view.children[b]) else "")
        for child in box.children:
            self._main(child)

    def _leaf(self, box: Box) -> None:
        view, block = box.view, box.view.block
        x, y, w, h = box.x, box.y, box.w, box.h
        mid = x + w / 2
        kind = {"once": "once", "per group": "group", "both": "both"}[block.computed]
        self._open(view.label, view.run)
        if view.shape == "expand":
            self._rect(x, y, w, h, "expand", 16)
            self._text(mid, y + 14, f"⇉ expand × {self._groups}", "small bold hot middle")
            self._text(mid, y + 27, clip(view.detail, 44), "tiny middle")
        elif view.shape == "glue":
            self._rect(x, y, w, h, f"{kind} glue", 10)
            self._text(mid, y + 14, clip(view.label, 24), "small middle")
        elif view.shape == "site":
            self._rect(x, y, w, h, _FRAME[block.computed], 6)
            self._text(x + 8, y + 15, view.label, "bold")
            self._text(x + w - 8, y + 15, f"LoRA · {self._percent(view.run)}", "small end")
            for number, row in enumerate(view.rows()):
                self._chips(row, x + 8, y + 23 + 21 * number)
        else:
            self._rect(x, y, w, h, kind, 6)
            self._text(mid, y + 16, _title(view), "bold middle")
            if view.detail:
                self._text(mid, y + 43, clip(view.detail, 60), "tiny middle")
            self._text(mid, y + 30, self._cost(view.run), "small middle")
        self._parts.append("</g>")

    def _chips(self, row: Sequence[Chip], x: float, y: float) -> None:
        for chip in row:
            w = chip_width(chip.label)
            self._rect(x, y, w, CHIP, "group" if chip.expanded else "once", 4)
            self._text(x + w / 2, y + 12.5, clip(chip.label, 14), "small middle")
            x += w + 4
            if chip.repeated:
                self._text(x + 4, y + 13, "⇉", "small bold hot middle")
                x += 12

    # The step around it --------------------------------------------------------------------------------------------

    def _panel(self, main: Box, aside: dict[str, Block], x: float, bottom: float) -> float:
        """Noise and perturbation beside the model, the update below; returns where the picture ends."""
        half, top, y = x + _PANEL / 2, main.y, bottom + 36
        projected = self._estimator.projected
        last = next((child for child in main.children if child.view.block.kind == "loss"), main.children[-1])
        middle = last.x + last.w / 2
        left = middle - _PANEL / 2
        adapter = aside["adapter"].nodes
        tensors = f"{len(adapter)} tensor{'s' if len(adapter) > 1 else ''}"
        values = sum(n.meta["val"].numel() for n in adapter)
        if "noise" in aside:
            self._note(x, top, "noise", "z = noise(seed, query, site, element)", aside["noise"])
            turn = x + _PANEL + 14
            self._line([(x + _PANEL, top + 23), (turn, top + 23), (turn, y + 23), (x + _PANEL, y + 23)], "noise")
            self._text(turn - 6, y - 12, "the same z", "small end")
        if "perturb" in aside:
            detail = f"{self._groups} copies of {tensors}: {self._estimator.copies or self._estimator.kind}"
            self._note(x, top + 74, "perturb", detail, aside["perturb"])
            self._line([(half, top + 46), (half, top + 74)], "noise")
            self._text(half + 8, top + 64, "z", "small")
            self._text(x + _PANEL, top + 136, f"adapter θ: {tensors}, {values:,} values", "tiny end")
            self._bus(main, x, top + 97)
        elif self._tangents:
            self._text(half, top + 62, f"tangents of {tensors} of the adapter θ, {values:,} values", "tiny middle")
            self._bus(main, x, top + 23)
        self._line([(middle, last.y + last.h), (middle, y)], "wide")
        losses = "loss f32[]" if not projected else f"losses f32[{self._groups}]"
        if self._tangents:
            losses = f"loss f32[] and its tangents f32[{self._groups}]"
        self._text(middle + 8, y - 14, losses, "small")
        title = "projected gradients" if projected else "gradient, by reverse mode"
        self._note(left, y, title, self._estimator.formula, aside["estimate"])
        self._note(x, y, "update", self._update, aside["update"])
        self._line([(left + _PANEL, y + 23), (x, y + 23)], "noise")
        self._line([(half, y + 46), (half, y + 66)], "noise")
        self._text(half, y + 80, f"new adapter: {tensors}", "bold middle")
        return y + 84

    def _bus(self, main: Box, x: float, y: float) -> None:
        """From the perturbed factors to every box that holds a product with them."""
        reached = [child for child in main.children if any(block.perturbed for block in child.view.run)]
        ends = [child.y + min(child.h / 2, 36) for child in reached]
        bus = x - 26
        for child, end in zip(reached, ends, strict=True):
            self._line([(x, y), (bus, y), (bus, end), (child.x + child.w, end)], "noise")

    def _note(self, x: float, y: float, title: str, detail: str, block: Block) -> None:
        self._open(title, (block,))
        self._rect(x, y, _PANEL, 46, "step", 6)
        self._text(x + _PANEL / 2, y + 18, title, "bold middle")
        self._text(x + _PANEL / 2, y + 34, clip(detail, 46), "tiny middle")
        self._parts.append("</g>")

    def _head(self, name: str, step: str, share: float) -> float:
        """Title, facts and legend; returns where they end."""
        self._text(_MARGIN, 34, f"{name}: one training step", "title")
        scale, unit = next((u for u in _UNITS if self._total >= u[0]), _UNITS[-1])
        once = f"{share:.0%} of a forward computed once"
        if self._tangents:
            once = f"{self._once / scale:.1f} of them for the values, computed once"
        facts = f"{step} · {self._total / scale:.1f} {unit} in a step · {once}"
        self._text(_MARGIN, 54, facts, "")
        x = _MARGIN
        entries = (
            ("once", "computed once"),
            ("group", f"computed for each of {self._groups} groups"),
            ("both", "part of it once"),
            ("step", "noise and update"),
        )
        for kind, text in entries:
            self._rect(x, 70, 18, 12, kind, 3)
            self._text(x + 24, 80, text, "small")
            x += 24 + width(text, SMALL) + 14
        self._text(x, 80, "⇉", "small bold hot")
        frontier = f"frontier: repeated × {self._groups} from here on"
        self._text(x + 14, 80, frontier, "small")
        return max(x + 14 + width(frontier, SMALL), _MARGIN + width(facts, TEXT))

    # Strokes -------------------------------------------------------------------------------------------------------

    def _cost(self, run: Sequence[Block]) -> str:
        if run[0].kind == "batch":
            return "input"
        marks = {"once": "once", "per group": f"× {self._groups}", "both": f"partly × {self._groups}"}
        share = self._percent(run)
        return marks[run[0].computed] if share == "0 %" else f"{share} · {marks[run[0].computed]}"

    def _percent(self, run: Sequence[Block]) -> str:
        share = 100 * sum(block.flops for block in run) / self._total if self._total else 0.0
        return "0 %" if not share else "<0.1 %" if share < 0.05 else f"{share:.1f} %"

    def _open(self, label: str, run: Sequence[Block]) -> None:
        number = len(self.blocks)
        self.blocks.append((label, run[0]))
        self._parts.append(f'<g class="block" data-block="{number}"><title>{escape(self._tip(run))}</title>')

    def _tip(self, run: Sequence[Block]) -> str:
        block = run[0]
        ops = Counter(op_name(n) for n in block.calls)
        lines = [block.name if block.name else block.kind]
        if len(run) > 1:
            lines[0] += f" … {run[-1].name}: {len(run)} alike"
        lines.append(f"{len(block.calls)} nodes, {block.flops:,} FLOPs, {self._cost(run)}")
        lines += [f"{count} × {op}" for op, count in ops.most_common(12)]
        lines += [f"repeated: {a} → {b}" for a, b in dict.fromkeys(block.frontier)]
        return "\n".join(lines)

    def _rect(self, x: float, y: float, w: float, h: float, kind: str, radius: float) -> None:
        style = ' fill="url(#both)" stroke="#90a4ae"' if kind.startswith("both") else f' class="{kind}"'
        self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius:g}"{style}/>')

    def _text(self, x: float, y: float, text: str, kind: str) -> None:
        mark = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{mark}>{escape(text)}</text>')

    def _line(self, points: Sequence[tuple[float, float]], kind: str, head: bool = True) -> None:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self._path(path, kind, head)

    def _flow(self, points: Sequence[tuple[float, float]], down: bool, kind: str) -> None:
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if down:
                bend = (y0 + y1) / 2
                path += f"C{x0:.1f} {bend:.1f} {x1:.1f} {bend:.1f} {x1:.1f} {y1:.1f}"
            else:
                bend = (x0 + x1) / 2
                path += f"C{bend:.1f} {y0:.1f} {bend:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
        self._path(path, kind, True)

    def _path(self, path: str, kind: str, head: bool) -> None:
        mark = {"": "a0", "wide": "a1", "noise": "a2"}[kind]
        end = f' marker-end="url(#{mark})"' if head else ""
        self._parts.append(f'<path class="flow{" " + kind if kind else ""}" d="{path}"{end}/>')


def _title(view: View) -> str:
    name = clip(view.label, 30)
    return f"{name}  × {len(view.run)}" if len(view.run) > 1 else name


def _remove_aside(view: View) -> None:
    kept = [i for i, child in enumerate(view.children) if child.block.kind not in _ASIDE]
    new = {old: place for place, old in enumerate(kept)}
    view.children = [view.children[i] for i in kept]
    view.edges = [(new[a], new[b]) for a, b in view.edges if a in new and b in new]


def _carries_groups(source: View, target: View) -> bool:
    inside = {node for block in source.run for node in block.nodes}
    return any(
        other in inside and (facts(other).expanded or other.target is mobizo.expand.default)
        for block in target.run
        for node in block.nodes
        for other in node.all_input_nodes
    )
