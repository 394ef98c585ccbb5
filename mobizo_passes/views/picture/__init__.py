"""Pictures of step programs at module level: what is computed once, what once per group.

Drawn by hand as SVG rather than with a plotting library: no dependency, text that stays text, a small file that is the
same on every machine, and tooltips.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mobizo_passes.errors import InputError
from mobizo_passes.views.blocks import block_tree
from mobizo_passes.views.picture.svg import Picture

if TYPE_CHECKING:
    from mobizo_passes.graph.ir import Ir
    from mobizo_passes.zo.scheme import Scheme

SUFFIXES = (".svg", ".html", ".json")


def check_suffix(path: Path) -> None:
    """Raise `InputError` for a file that is no picture of ours."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a graph is drawn as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, found '{path.name}'")


def draw(ir: Ir, path: Path, *, name: str, estimator: Scheme, sites: int, share: float, update: str = "") -> None:
    """Write a step program's picture as .svg."""
    path.write_text(Picture(block_tree(ir), name, estimator, sites, share, update).svg, encoding="utf-8")
