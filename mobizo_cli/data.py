"""Labelled text from JSONL and CSV files, in an order that is a pure function of seed and step."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from mobizo_cli.task import TextTask
    from mobizo_cli.text import PromptEncoder


@dataclass(frozen=True)
class Example:
    """One row: the finished prompt, and the label's number."""

    prompt: str
    label: int


def load_examples(path: Path, task: TextTask) -> list[Example]:
    """Read a ``.jsonl`` or ``.csv`` file.

    Raises:
        DataError: missing or unreadable file, unknown ending, malformed line, missing column, label without a word, or
            no row at all; with the row's line number.
    """
    rows = {".jsonl": _jsonl_rows, ".csv": _csv_rows}.get(path.suffix.lower())
    if rows is None:
        raise DataError(f"{path}: expected a file that ends in .jsonl or .csv.")
    try:
        examples = [_example(path, line, row, task) for line, row in rows(path)]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert the file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not examples:
        raise DataError(f"{path}: holds no rows.")
    return examples


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}.")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                # Cells beyond the header are under None; cells that are absent are None.
                yield reader.line_num, {name: cell for name, cell in row.items() if name and cell is not None}
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.reader.line_num}: not CSV ({error}).") from error


def _example(path: Path, line: int, row: dict[str, Any], task: TextTask) -> Example:
    for column in (*task.columns, task.label_column):
        if column not in row:
            raise DataError(f"{path}, line {line}: no column {column!r}; found {sorted(row)}.")
    value = _as_text(row[task.label_column])
    if value not in task.label_values:
        raise DataError(
            f"{path}, line {line}: the label {value!r} has no word; the program knows {list(task.label_values)}."
        )
    prompt = task.template.format(**{column: _as_text(row[column]) for column in task.columns})
    return Example(prompt, task.label_values.index(value))


def _as_text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


class ExampleBatches:
    """Training batches without end: each epoch visits every example once, in an order of its own.

    ``batch(step)`` depends on nothing but the examples, the seed and the step. Orders come from SHA-256, so that they
    are the same in every Python release, which no standard shuffle promises.
    """

    def __init__(self, examples: Sequence[Example], encoder: PromptEncoder, size: int, seed: int) -> None:
        self._examples = tuple(examples)
        self._encoder = encoder
        self._size = size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []
        text = json.dumps([[example.prompt, example.label] for example in examples])
        #: Goes into the journal, so that a run is not resumed on other data.
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def indices(self, step: int) -> list[int]:
        """Which examples make the batch of ``step``."""
        return [self._at(step * self._size + place) for place in range(self._size)]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of ``step``."""
        chosen = [self._examples[index] for index in self.indices(step)]
        return self._encoder.batch([example.prompt for example in chosen], [example.label for example in chosen])

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = sorted(
                range(len(self._examples)),
                key=lambda index: hashlib.sha256(f"{self._seed}/{epoch}/{index}".encode()).digest(),
            )
        return self._order[place]


def in_order(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """The examples, ``size`` at a time; the last group may be smaller."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]
