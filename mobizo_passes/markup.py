"""HTML for notebooks, in which nothing of a model is markup, and which takes its colors from the page around it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Notebooks' own style sheets move numbers and words to the right.
_CELL = 'style="text-align:left"'


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, folded: bool = False) -> str:
    """Return a table; without columns it has no head, `folded` it shows its title alone until it is clicked."""
    head = "".join(f"<th {_CELL}>{html.escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td {_CELL}>{_lines(cell)}</td>' for cell in row)}</tr>" for row in rows)
    inside = f"<table>{f'<thead><tr>{head}</tr></thead>' if columns else ''}<tbody>{body}</tbody></table>"
    return details(title, inside) if folded else f"<p><b>{html.escape(title)}</b></p>{inside}"


def details(title: str, inside: str) -> str:
    """Return HTML that shows its title alone until it is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def counted(count: int, one: str, several: str = "") -> str:
    """Return ``1 site`` or ``2 sites``."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def code(text: str) -> str:
    """Return text as it is, in lines that scroll and do not wrap."""
    return f'<pre style="overflow-x:auto;max-height:30em;white-space:pre">{html.escape(text)}</pre>'


class Frame:
    """A page of its own inside of a notebook's, to be the last value of a cell."""

    def __init__(self, page: str, height: int, title: str) -> None:
        self.page = page
        self.height = height
        self.title = title

    def __repr__(self) -> str:
        return f"<{self.title}, {len(self.page) / 1e6:.2f} MB of HTML, shown in notebooks>"

    def _repr_html_(self) -> str:
        # The page needs its scripts, and nothing of the notebook's.
        return (
            f'<iframe title="{html.escape(self.title)}" srcdoc="{html.escape(self.page)}" sandbox="allow-scripts" '
            f'style="width:100%;height:{self.height}px;border:1px solid" loading="lazy"></iframe>'
        )


def _lines(cell: object) -> str:
    return html.escape(str(cell)).replace("\n", "<br>")
