"""Where results go: tables on stdout. Progress and errors go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mobizo_cli.errors import printable

#: Results. A file or a pipe has no width of its own: wide enough there for the names of modules.
out = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True, highlight=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table. Cells are text as it is: brackets in them mean nothing."""
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*(Text("\n".join(map(printable, str(cell).split("\n")))) for cell in row))
    out.print(result)


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, aligned, one pair a line."""
    items = [(printable(name), str(value)) for name, value in pairs]
    width = max((len(name) for name, _ in items), default=0)
    for name, value in items:
        out.print(f"{name:<{width}}  {printable(value)}", markup=False)


_DIFF = {"-": "red", "+": "green", "~": "yellow", "@": "cyan", "…": "dim"}


def terminal_width() -> int | None:
    """Columns of the terminal; None for a file or a pipe, whose lines are not cut."""
    return out.width if out.is_terminal else None


def diff(text: str) -> None:
    """Print a diff of graphs, colored where the output is a terminal."""
    for number, line in enumerate(text.splitlines()):
        out.print(Text(line, style="bold" if number < 2 else _DIFF.get(line[:1], "")))
