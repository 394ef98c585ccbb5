"""Every row of the coverage table agrees with the reference, eager and lowered, or is refused for its reason."""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest
from _pytest.mark.structures import ParameterSet

from tests.coverage.catalogue import ROWS, TABLE, document, line, start, table, written
from tests.coverage.row import Row, outcome
from tests.self_check import DEEP, check_itself
from tests.text_form import check_text, values_of

UPDATE = bool(os.environ.get("MOBIZO_UPDATE_COVERAGE"))
ADVICE = "run MOBIZO_UPDATE_COVERAGE=1 pytest tests/coverage"

# Rows share nothing, so a run spreads them over its processes: this many parts, each in one process.
PARTS = 4


def spread(rows: tuple[Row, ...]) -> list[ParameterSet]:
    size = -(-len(rows) // PARTS)
    return [pytest.param(row, id=f"part{place // size}-{row}") for place, row in enumerate(rows)]


@pytest.mark.parametrize("row", spread(ROWS))
def test_row(row: Row) -> None:
    got = outcome(row)
    expected = row.refused
    if expected is None:
        assert got.error is None, str(got.error)
        # Losses that do not differ would agree with anything: the row must test something.
        assert got.spread > 10 * got.tolerance
        assert got.sites
        program = got.program
        assert program is not None
        methods = program.methods if DEEP else ("step",)
        cores = {method: program.core_ir(method) for method in methods}
        # Its text reads back into the same program.
        for method in program.methods:
            check_text(program._methods[method], values_of(program) if method == "step" else None)
        for method, core in cores.items():
            check_text(core, values_of(program) if method == "step" else None)
        # What it lowers to, in ExecuTorch's runtime, is its eager form again.
        check_itself(program, "portable", *methods, cores=cores)
    else:
        assert got.error is not None, "agrees now: drop refused= from the row"
        assert type(got.error) is expected.error, repr(got.error)
        assert re.search(expected.reason, str(got.error), re.DOTALL), str(got.error)
    if not UPDATE:
        assert written(TABLE.read_text(encoding="utf-8"))[row] == line(row), ADVICE


def test_table_is_up_to_date() -> None:
    """`test_row` has compared the line of each row; here it is everything around them, and their order."""
    if UPDATE:
        TABLE.write_text(table(), encoding="utf-8")
    text = TABLE.read_text(encoding="utf-8")
    lines = written(text)
    assert document(lines) == text, ADVICE
    assert [row for row, each in lines.items() if not each.startswith(start(row))] == [], ADVICE


def test_the_catalogue_is_what_it_says() -> None:
    names = Counter(str(row) for row in ROWS)
    assert not [name for name, count in names.items() if count > 1]
    agreeing = [row for row in ROWS if row.refused is None]
    assert len(agreeing) >= 45
    for wanted in ("lora_A+lora_B", "rademacher", "one-sided"):
        with_it = [row for row in agreeing if wanted in row.shown_options]
        # Spread over families, not over one.
        assert len({row.architecture for row in with_it}) >= 7
