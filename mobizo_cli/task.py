"""The text task of a program: prompt template, label words, tokenizer. Written into the manifest, read back from it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobizo_cli.errors import ModelError, OptionError

if TYPE_CHECKING:
    from runtime_driver.format import Manifest

LossKind = Literal["label-words", "vocabulary"]
TASK = "text-classification"
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class TextTask:
    """Classification by the word that follows a prompt.

    Attributes:
        template: text with columns of the data in braces. The prompt ends where the word would follow.
        label_column: the column of the data that holds the label.
        label_values: the label's values as text, in the order of the labels.
        label_words: the word of each label, with its leading space.
        label_ids: the token of each word.
        loss: cross-entropy over the label words alone, or over the whole vocabulary.
        max_length: tokens of a prompt; shorter ones are padded on the left, longer ones cut on the left.
        tokenizer: directory of the tokenizer's files, beside the .pte.
        tokenizer_sha256: SHA-256 of each of these files; empty in programs of version 0.1.
    """

    template: str
    label_column: str
    label_values: tuple[str, ...]
    label_words: tuple[str, ...]
    label_ids: tuple[int, ...]
    loss: LossKind
    max_length: int
    tokenizer: str
    tokenizer_sha256: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names."""
        return template_columns(self.template)

    def prompt(self, cells: Mapping[str, str]) -> str:
        """The template with a text for each column."""
        return "".join(text + ("" if name is None else cells[name]) for text, name in _parts(self.template))

    def application(self) -> dict[str, Any]:
        """The manifest's ``application``."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"task": TASK, **fields}

    @classmethod
    def of(cls, manifest: Manifest, path: Path) -> TextTask:
        """The task in a manifest.

        Raises:
            ModelError: the program was lowered without one, or with one that this command does not know.
        """
        data: Mapping[str, Any] = manifest.application
        if data.get("task") != TASK:
            raise ModelError(
                f"{path}: the program carries no text task, so prompts cannot be made for it. "
                "Lower the model with `mobizo lower`, or drive this program from Python with runtime_driver."
            )
        fields: dict[str, Any] = {"tokenizer_sha256": {}, **data}
        for name, fits in _FIELDS.items():
            if not fits(fields.get(name)):
                raise ModelError(f"{path}: the manifest's `application.{name}` is unusable. Lower the model again.")
        if not len(fields["label_values"]) == len(fields["label_words"]) == len(fields["label_ids"]):
            raise ModelError(f"{path}: the manifest's labels, words and tokens differ in number. Lower it again.")
        values: dict[str, Any] = {}
        for name in _FIELDS:
            values[name] = tuple(fields[name]) if isinstance(fields[name], list) else fields[name]
        task = cls(**values)
        shapes = [item.shape for item in manifest.methods["step"].inputs if item.name == "input_ids"]
        if any(shape[1:] != (task.max_length,) for shape in shapes):
            raise ModelError(
                f"{path}: the manifest's `application.max_length` is {task.max_length}, but `step` takes "
                f"input_ids of shape {list(shapes[0])}. Lower the model again."
            )
        try:
            template_columns(task.template)
        except OptionError as error:
            raise ModelError(f"{path}: {error} Lower the model again.") from error
        return task


def _list_of(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and len(value) > 1 and all(type(item) is kind for item in value)


#: The fields of a manifest's `application`, and what each has to be.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "template": lambda value: isinstance(value, str),
    "label_column": lambda value: isinstance(value, str),
    "label_values": _list_of(str),
    "label_words": _list_of(str),
    "label_ids": _list_of(int),
    "loss": lambda value: value in get_args(LossKind),
    "max_length": lambda value: type(value) is int and value > 1,
    # One plain name: the tokenizer is in the program's own directory.
    "tokenizer": lambda value: isinstance(value, str) and value not in ("", "..") and Path(value).name == value,
    "tokenizer_sha256": lambda value: isinstance(value, dict) and all(type(item) is str for item in value.values()),
}


def _parts(template: str) -> list[tuple[str, str | None]]:
    """The template's texts, each with the column that follows it; None where none does."""
    return [(text, name) for text, name, _, _ in string.Formatter().parse(template)]


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names: plain names in braces; ``{{`` and ``}}`` stand for braces.

    Raises:
        OptionError: unbalanced braces, no column, a column that is not a plain name, one with a conversion or a
            format, or text that is not Unicode.
    """
    check_text("--template", template)
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError as error:
        raise OptionError(f"--template {template!r} is not a template: {error}.") from error
    if not fields:
        raise OptionError(f"--template {template!r} names no column; write for example '{{text}} It was'.")
    columns: list[str] = []
    for name, specification, conversion in fields:
        if not name or not name.isidentifier():
            raise OptionError(f"--template {template!r}: {{{name}}} is not the plain name of a column.")
        if specification or conversion:
            raise OptionError(
                f"--template {template!r}: {{{name}}} has a conversion or a format; write the column's name alone."
            )
        columns.append(name)
    return tuple(dict.fromkeys(columns))


def check_text(option: str, text: str) -> None:
    """Raise :class:`OptionError` for an argument that is not Unicode text, as the shell can pass it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{option} {text!r} is not UTF-8 text.") from error


def parse_labels(text: str) -> dict[str, str]:
    """``"0= terrible,1= great"`` -> ``{"0": " terrible", "1": " great"}``; spaces in a word count.

    Raises:
        OptionError: an item without ``=``, an empty word, a value given twice, or fewer than two labels.
    """
    check_text("--labels", text)
    labels: dict[str, str] = {}
    for item in text.split(","):
        value, equals, word = item.partition("=")
        value = value.strip()
        if not equals or not value or not word.strip():
            raise OptionError(
                f"--labels {text!r}: expected VALUE=WORD, found {item!r}. Example: '0= terrible,1= great'."
            )
        if value in labels:
            raise OptionError(f"--labels {text!r}: the value {value!r} is given twice.")
        labels[value] = word
    if len(labels) < 2:
        raise OptionError(f"--labels {text!r}: expected at least two labels.")
    return labels


def parse_layers(text: str) -> list[int]:
    """``"15-29"`` or ``"0,3,5-7"`` -> the numbers, sorted.

    Raises:
        OptionError: anything else than numbers and ranges, an empty range, or a number that no model reaches.
    """
    layers: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise OptionError(f"--layers {text!r}: expected numbers and ranges such as 0,3,15-29, found {item!r}.")
        # Compared by length first: a number of thousands of digits is none that int() takes.
        if any(len(number) > len(str(_MOST_LAYERS)) for number in (first, last)) or int(last or first) >= _MOST_LAYERS:
            raise OptionError(
                f"--layers: {item.strip()[:40]!r} is beyond the {_MOST_LAYERS} layers that a model may have."
            )
        stop = int(last or first)
        if stop < int(first):
            raise OptionError(f"--layers {text!r}: the range {item!r} is empty.")
        layers.update(range(int(first), stop + 1))
    return sorted(layers)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
