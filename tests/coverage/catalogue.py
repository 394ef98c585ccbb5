"""All rows of the coverage table, in its order, and the table as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.coverage import adapter_rows, hf_rows, pair_rows, peft_rows, whole_rows, written_rows
from tests.coverage.row import Row, outcome

TABLE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"

SECTIONS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    ("What PEFT can attach", peft_rows.ROWS),
    ("Architectures of Hugging Face's transformers, under PEFT", hf_rows.ROWS),
    ("PEFT's other methods: what PEFT marks is trained", adapter_rows.PEFT),
    ("Parameters chosen by name", adapter_rows.CHOSEN),
    ("Hand-written: spellings of LoRA", written_rows.SPELLINGS),
    ("Hand-written: layouts", written_rows.LAYOUTS),
    ("Hand-written: whole models", whole_rows.ROWS),
    ("Losses", written_rows.LOSSES),
    ("Losses of pairs, made in one forward", pair_rows.PAIRS),
    ("Several losses in a list", pair_rows.LISTS),
    ("What couples the examples of a batch", written_rows.COUPLED),
)
ROWS: tuple[Row, ...] = tuple(row for _, rows in SECTIONS for row in rows)

INTRODUCTION = """# Coverage

Written by a test run (`MOBIZO_UPDATE_COVERAGE=1 pytest tests/coverage`); another test compares it with what the run
gives. Every model is tiny, with random weights, LoRA-B not zero, a batch of three examples. **agrees**: losses,
projected gradients and updated tensors of one step equal the sequential reference on the untransformed model; under
*exact*, the gradient by reverse mode equals autograd's in float64, and under *forward*, two directional derivatives do.
**refused**: `mobizo_passes.transform` raises the error shown, on purpose. Sites: how many low-rank updates were
found; without any, how many tensors are trained.
Options other than the default (two queries, two-sided, Gaussian noise, `lora_B` trained) are named.
"""


HEAD = (
    "| architecture | variant | options | sites | result | exact | forward |",
    "|---|---|---|--:|---|---|---|",
)


def table() -> str:
    """Return the whole of docs/coverage.md; runs every row that has not run in this process."""
    return document({row: line(row) for row in ROWS})


def line(row: Row) -> str:
    """Return the line of the table that a run of this row gives."""
    got = outcome(row)
    cells = " | ".join(got.derivative_text(name) for name in ("exact", "forward"))
    return f"{start(row)} {got.sites if got.error is None else '–'} | {got.text()} | {cells} |"


def start(row: Row) -> str:
    """Return what stands in a row's line whatever the run gives."""
    return f"| {row.architecture} | {row.variant} | {row.shown_options} |"


def document(lines: Mapping[Row, str]) -> str:
    """Return docs/coverage.md around the lines of all rows."""
    columns = list(zip(*(each.removesuffix(" |").split(" | ")[4:7] for each in lines.values()), strict=True))
    agree, exact, forward = (sum(cell == "agrees" for cell in column) for column in columns)
    counts = (
        f"{agree} agree, {len(lines) - agree} are refused on purpose; of {exact} the exact gradient agrees too, and of "
        f"{forward} directional derivatives do."
    )
    text = [INTRODUCTION, f"{len(lines)} rows: {counts}"]
    for title, rows in SECTIONS:
        text += ["", f"## {title}", "", *HEAD, *(lines[row] for row in rows)]
    return "\n".join(text) + "\n"


def written(text: str) -> dict[Row, str]:
    """Return the lines of all rows as they stand in the document; raises `ValueError` if it has another number."""
    rows = [each for each in text.splitlines() if re.match(r"\| (?!architecture \|)", each)]
    return dict(zip(ROWS, rows, strict=True))
