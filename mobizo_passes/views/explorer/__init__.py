"""The explorer: programs as one HTML file to look through, that loads nothing from elsewhere.

The page's own scripts are beside this file, in the order of `SCRIPTS`; the layout is dagre's, see `layout_library`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import networkx

from mobizo_passes.errors import MobizoError
from mobizo_passes.views.explorer.columns import NodeData
from mobizo_passes.views.explorer.document import Document
from mobizo_passes.views.explorer.layout_library import LibraryUnavailable, library

if TYPE_CHECKING:
    from mobizo_passes.graph.ir import Ir
    from mobizo_passes.graph.passes import PassRecord

__all__ = ["LayoutLibraryMissing", "NodeData", "explore", "layout"]

SCRIPTS = ("graph", "blocks", "layout", "overlays", "pane", "pointer", "outline", "details", "passes", "search", "main")
_HERE = Path(__file__).parent


class LayoutLibraryMissing(MobizoError):
    """The explorer's layout library is not installed."""


def layout() -> str:
    """Return the layout library's text; raises `LayoutLibraryMissing`."""
    try:
        return library().read_text(encoding="utf-8")
    except LibraryUnavailable as error:
        raise LayoutLibraryMissing(str(error)) from error


def explore(
    *,
    title: str,
    facts: Sequence[str],
    step: Ir,
    captured: Ir,
    history: Sequence[PassRecord],
    beside: tuple[str, Ir | networkx.DiGraph] | None = None,
    data: Mapping[str, NodeData] | None = None,
    depth: int | None = None,
) -> str:
    """Return a step program's page, with a second graph under a name of its own if that is given.

    It opens with `depth` levels of modules unfolded; None: with what holds nearly everything.

    Raises:
        InputError: `data` names nodes that the program has not.
        LayoutLibraryMissing: the layout library was not fetched when the package was built.
    """
    text = layout()
    document = Document(title, facts, depth)
    document.add_ir("step", step, data or {}, captured)
    if beside is not None:
        name, other = beside
        if isinstance(other, networkx.DiGraph):
            document.add_networkx(name, other)
        else:
            document.add_ir(name, other, {})
    document.add_passes(history)
    return _page(document, text)


def _page(document: Document, library_text: str) -> str:
    scripts = "\n".join((_HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    # `</` would end the script element early.
    data = json.dumps(document.json(), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    parts = {
        "title": escape(document.title),
        "css": (_HERE / "explorer.css").read_text(encoding="utf-8"),
        "data": data,
        # Its source map is not here.
        "library": re.sub(r"//# sourceMappingURL=.*", "", library_text),
        "script": scripts,
    }
    page = (_HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], page)
