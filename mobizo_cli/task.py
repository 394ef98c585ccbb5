"""The text task of a program: prompt template, label words, tokenizer. Written into the manifest, read back from it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mobizo_cli.errors import ModelError, OptionError

if TYPE_CHECKING:
    from mobizo_manifest import Manifest

LossKind = Literal["label-words", "vocabulary"]
TASK = "text-classification"


@dataclass(frozen=True)
class TextTask:
    """Classification by the word that follows a prompt.

    Attributes:
        template: ``str.format`` text; its fields are columns of the data. The prompt ends where the word would follow.
        label_column: the column of the data that holds the label.
        label_values: the label's values as text, in the order of the labels.
        label_words: the word of each label, with its leading space.
        label_ids: the token of each word.
        loss: cross-entropy over the label words alone, or over the whole vocabulary.
        max_length: tokens of a prompt; shorter ones are padded on the left, longer ones cut on the left.
        tokenizer: directory of the tokenizer's files, relative to the .pte.
    """

    template: str
    label_column: str
    label_values: tuple[str, ...]
    label_words: tuple[str, ...]
    label_ids: tuple[int, ...]
    loss: LossKind
    max_length: int
    tokenizer: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names."""
        return template_columns(self.template)

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
        fields: dict[str, Any] = {name: data.get(name) for name in cls.__dataclass_fields__}
        absent = sorted(name for name, value in fields.items() if value is None)
        if data.get("task") != TASK or absent or fields["loss"] not in get_args(LossKind):
            raise ModelError(
                f"{path}: the program carries no text task, so prompts cannot be made for it. "
                "Lower the model with `mobizo lower`, or drive this program from Python with runtime_driver."
            )
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**values)


def template_columns(template: str) -> tuple[str, ...]:
    """The fields of a ``str.format`` template.

    Raises:
        OptionError: not a valid template, no field, or a field that is not a plain name.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise OptionError(f"--template {template!r} is not a format string: {error}.") from error
    if not fields:
        raise OptionError(f"--template {template!r} names no column; write for example '{{text}} It was'.")
    for name in fields:
        if not name.isidentifier():
            raise OptionError(f"--template {template!r}: {{{name}}} is not the plain name of a column.")
    return tuple(dict.fromkeys(fields))


def parse_labels(text: str) -> dict[str, str]:
    """``"0= terrible,1= great"`` -> ``{"0": " terrible", "1": " great"}``; spaces in a word count.

    Raises:
        OptionError: an item without ``=``, an empty word, a value given twice, or fewer than two labels.
    """
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
    """``"15-29"`` or ``"0,3,5-7"`` -> the numbers, sorted. Raises :class:`OptionError`."""
    layers: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise OptionError(f"--layers {text!r}: expected numbers and ranges such as 0,3,15-29, found {item!r}.")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise OptionError(f"--layers {text!r}: the range {item!r} is empty.")
        layers.update(range(int(first), stop + 1))
    return sorted(layers)
