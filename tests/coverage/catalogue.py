"""All rows of the coverage table, in its order, and the table as text."""

from __future__ import annotations

from pathlib import Path

from tests.coverage import hf_rows, peft_rows, whole_rows, written_rows
from tests.coverage.row import Row, outcome

TABLE = Path(__file__).resolve().parents[2] / "docs" / "coverage.md"

SECTIONS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    ("What PEFT can attach", peft_rows.ROWS),
    ("Architectures of Hugging Face's transformers, under PEFT", hf_rows.ROWS),
    ("Hand-written: spellings of LoRA", written_rows.SPELLINGS),
    ("Hand-written: layouts", written_rows.LAYOUTS),
    ("Hand-written: whole models", whole_rows.ROWS),
    ("Losses", written_rows.LOSSES),
    ("What couples the examples of a batch", written_rows.COUPLED),
)
ROWS: tuple[Row, ...] = tuple(row for _, rows in SECTIONS for row in rows)

INTRODUCTION = """# Coverage

Written by a test run (`MOBIZO_UPDATE_COVERAGE=1 pytest tests/coverage`); another test compares it with what the run
gives. Every model is tiny, with random weights, LoRA-B not zero, a batch of three examples. **agrees**: losses,
projected gradients and updated tensors of one step equal the sequential reference on the untransformed model.
**refused**: `mobizo_passes.transform` raises the error shown, on purpose. Sites: how many low-rank updates were found.
Options other than the default (two queries, two-sided, Gaussian noise, `lora_B` trained) are named.
"""


def table() -> str:
    """Return the whole of docs/coverage.md; runs every row that has not run in this process."""
    agree = sum(outcome(row).error is None for row in ROWS)
    lines = [INTRODUCTION, f"{len(ROWS)} rows: {agree} agree, {len(ROWS) - agree} are refused on purpose."]
    for title, rows in SECTIONS:
        lines += [
            "",
            f"## {title}",
            "",
            "| architecture | variant | options | sites | result |",
            "|---|---|---|--:|---|",
        ]
        for row in rows:
            got = outcome(row)
            sites = str(got.sites) if got.error is None else "–"
            lines.append(f"| {row.architecture} | {row.variant} | {row.shown_options} | {sites} | {got.text()} |")
    return "\n".join(lines) + "\n"
