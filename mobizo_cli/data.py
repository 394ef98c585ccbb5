"""Labelled text from JSONL and CSV files, in an order that is a pure function of seed and step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import DataError
from mobizo_cli.rows import Number, Row, other_separator, read_rows

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
        DataError: missing or unreadable file, unknown ending, malformed line, missing column, a cell that is no text,
            label without a word, or no row at all; with the line on which the row starts.
    """
    examples = [_example(f"{path}, line {line}", row, task) for line, row in read_rows(path)]
    if not examples:
        raise DataError(f"{path}: holds no rows.")
    return examples


def _example(place: str, row: Row, task: TextTask) -> Example:
    for column in (*task.columns, task.label_column):
        if column not in row:
            found = sorted(row)
            raise DataError(f"{place}: no column {column!r}; found {found}.{other_separator(found)}")
    label = _label(place, task.label_column, row[task.label_column])
    if label not in task.label_values:
        raise DataError(f"{place}: the label {label!r} has no word; the program knows {list(task.label_values)}.")
    cells = {column: _text(place, column, row[column]) for column in task.columns}
    prompt = task.prompt(cells)
    if not prompt.strip():
        raise DataError(f"{place}: the prompt is empty: {' and '.join(map(repr, task.columns))} without text.")
    return Example(prompt, task.label_values.index(label))


def _text(place: str, column: str, value: Any) -> str:
    if isinstance(value, Number):
        # What the program would read must be what stands in the file.
        if value.canonical != value:
            raise DataError(f"{place}: column {column!r} is the number {value}; write text in double quotes.")
        return value.canonical
    if not isinstance(value, str):
        raise DataError(f"{place}: column {column!r} is {_kind(value)}, expected text.")
    return _checked(place, column, value)


def _label(place: str, column: str, value: Any) -> str:
    if isinstance(value, Number):
        return value.canonical
    if isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: the label, column {column!r}, is {_kind(value)}, expected text or a number.")
    return _checked(place, column, value)


def _checked(place: str, column: str, text: str) -> str:
    if "\0" in text:
        raise DataError(f"{place}: column {column!r} holds a zero byte; remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(f"{place}: column {column!r} holds {half!r}, half of a surrogate pair; remove it.") from error
    return text.strip()


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a list" if isinstance(value, list) else "an object"


def remarks(path: Path, examples: Sequence[Example], task: TextTask, encoder: PromptEncoder) -> list[str]:
    """What a user should know of a data file that can be used: texts that lose tokens, and rows without text."""
    cut = sum(encoder.count(example.prompt) > encoder.prompt_length for example in examples)
    blank = task.prompt(dict.fromkeys(task.columns, ""))
    empty = sum(example.prompt == blank for example in examples)
    found = []
    if cut:
        found.append(f"{path}: {cut} of {len(examples)} texts were cut to {encoder.prompt_length} tokens")
    if empty:
        found.append(f"{path}: {empty} of {len(examples)} rows have no text")
    return found


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
        #: Goes into the journal, so that a run is not resumed on other data.
        self.fingerprint = _fingerprint(examples, encoder, size)
        #: What version 0.1 wrote there; its journals can be resumed.
        self.former_fingerprint = _former_fingerprint(examples)

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


def _fingerprint(examples: Sequence[Example], encoder: PromptEncoder, size: int) -> str:
    """Over everything that batches are made from: prompts, their tokens, labels, the labels' tokens, batch size."""
    digest = hashlib.sha256(json.dumps(["mobizo-data-2", size, list(encoder.label_ids)]).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, encoder.tokens(example.prompt), example.label]).encode())
    return digest.hexdigest()


def _former_fingerprint(examples: Sequence[Example]) -> str:
    text = json.dumps([[example.prompt, example.label] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def in_order(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """The examples, ``size`` at a time; the last group may be smaller."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]
