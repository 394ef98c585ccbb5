"""The rows of a JSONL or CSV file, each with the line it starts on; whatever is ambiguous is an error."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mobizo_cli.errors import DataError

#: A cell of a CSV file may be as long as a line of JSONL: the reader's own limit is 128 KiB.
_LONGEST_CELL = 2**31 - 1
_OTHER_SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}

Row = dict[str, Any]


class Number(str):
    """A JSON number as it is written in the file, so that ``1.50`` is not silently read as ``1.5``."""

    __slots__ = ()

    @property
    def canonical(self) -> str:
        """The number as JSON writers write it."""
        if any(mark in self for mark in ".eE"):
            return repr(float(self))
        return "0" if self == "-0" else str(self)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The first line and the cells of each row, by column.

    Cells of a CSV file are str. Those of a JSONL file are what JSON has, with :class:`Number` for numbers.

    Raises:
        DataError: unknown ending, missing or unreadable file, text that is not UTF-8, a line that is not JSON or CSV,
            a column named twice, or a row with more or fewer cells than the header.
    """
    reader = {".jsonl": _jsonl, ".csv": _csv}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file that ends in .jsonl or .csv.")
    try:
        yield from reader(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}{_undecodable(path)}: not UTF-8 text ({error.reason}). Convert the file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _undecodable(path: Path) -> str:
    """The first line that is not UTF-8; the decoder itself counts bytes from the last block that it read."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f", line {number}"
    return ""


def _lines(path: Path, newline: str | None) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        for number, line in enumerate(file, start=1):
            if "\0" in line:
                raise DataError(f"{path}, line {number}: holds a zero byte; is the file UTF-16? Convert it to UTF-8.")
            yield number, line


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, None):
        if not line.strip():
            continue
        try:
            row = json.loads(
                line,
                object_pairs_hook=_object,
                parse_int=Number,
                parse_float=Number,
                parse_constant=_no_constant,
            )
        except RecursionError as error:
            raise DataError(f"{path}, line {number}: not usable JSON (nested too deeply).") from error
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            found = "number" if isinstance(row, Number) else type(row).__name__
            raise DataError(f"{path}, line {number}: expected a JSON object, found {found}.")
        yield number, row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row: Row = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"the key {key!r} occurs twice in one object")
        row[key] = value
    return row


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON value")


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    with _long_cells():
        rows = _csv_rows(path)
        first = next(rows, None)
        if first is None:
            return
        line, header = first
        named = [name for name in header if name]
        for name in named:
            if named.count(name) > 1:
                raise DataError(
                    f"{path}, line {line}: {named.count(name)} columns are named {name!r}; rename or remove."
                )
        for number, cells in rows:
            if len(cells) != len(header):
                raise DataError(f"{path}, line {number}: {_ragged(header, cells)}")
            # A column without a name, such as the row numbers that pandas writes, can't be asked for.
            yield number, {name: cell for name, cell in zip(header, cells, strict=True) if name}


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line each record starts on, and its cells; a record may span lines, and blank lines are none."""
    start = 1
    reader = csv.reader((line for _, line in _lines(path, "")), strict=True)
    try:
        for cells in reader:
            if len(cells) > 1 or (cells and cells[0].strip()):
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: not CSV ({error}).") from error


def _ragged(header: list[str], cells: list[str]) -> str:
    counts = f"the row has {_count(len(cells), 'cell')}, the header {_count(len(header), 'column')} {header}"
    if len(cells) < len(header):
        return f"no column {header[len(cells)]!r}: {counts}."
    return f"{counts}; a text with commas stands in double quotes."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def other_separator(columns: list[str]) -> str:
    """A remark where a CSV file's only column looks like several with another separator; else ``""``."""
    for separator, name in _OTHER_SEPARATORS.items():
        if len(columns) == 1 and separator in columns[0]:
            return f" The file seems to be separated by {name}: write it with commas."
    return ""


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
