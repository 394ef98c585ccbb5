"""HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_WIDE, _HIGH = 320, 80


def facts(title: str, pairs: Iterable[tuple[str, object]]) -> str:
    """Return names and values as a table; nothing in them is markup."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in pairs)
    return f"<table><caption>{escape(title)}</caption><tbody>{''.join(rows)}</tbody></table>"


def curve(values: Sequence[float], title: str) -> str:
    """Return finite values over their numbers as a small line; long runs as means of equal parts. Empty for one."""
    part = -(-len(values) // _WIDE) or 1
    means = [sum(values[at : at + part]) / len(values[at : at + part]) for at in range(0, len(values), part)]
    if len(means) < 2:
        return ""
    low, high = min(means), max(means)
    scale = (_HIGH - 4) / ((high - low) or 1.0)
    points = (
        f"{_WIDE * i / (len(means) - 1):.1f},{_HIGH - 2 - (value - low) * scale:.1f}" for i, value in enumerate(means)
    )
    return (
        f'<svg width="{_WIDE}" height="{_HIGH}" viewBox="0 0 {_WIDE} {_HIGH}" role="img"><title>{escape(title)}</title>'
        f'<polyline fill="none" stroke="currentColor" stroke-width="1.5" points="{" ".join(points)}"/></svg>'
    )
