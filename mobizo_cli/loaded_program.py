"""What the commands that use a program have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobizo_cli import tokenizer_files
from mobizo_cli.data import Example, in_order, load_examples, remarks
from mobizo_cli.errors import ModelError, needs, note
from mobizo_cli.task import TextTask
from mobizo_cli.text import PromptEncoder, label_ids, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver import Session


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy over a data set."""

    loss: float
    accuracy: float
    correct: int
    examples: int


@dataclass(frozen=True)
class Use:
    """An open program with its task."""

    session: Session
    task: TextTask
    encoder: PromptEncoder

    def examples(self, path: Path) -> list[Example]:
        """Read a data file, and say what of it the program will not see. Raises :class:`DataError`."""
        examples = load_examples(path, self.task)
        for remark in remarks(path, examples, self.task, self.encoder):
            note(remark)
        return examples

    def eval_batches(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """All examples in order; the last batch may be smaller."""
        return [
            self.encoder.batch([example.prompt for example in group], [example.label for example in group])
            for group in in_order(examples, self.session.manifest.batch.size)
        ]

    @property
    def in_run_label_ids(self) -> tuple[int, ...] | None:
        """For accuracy inside a run; with the vocabulary loss the batches hold the answer, so only `score` has it."""
        return self.task.label_ids if self.task.loss == "label-words" else None

    def score(self, examples: Sequence[Example]) -> Score:
        """Loss and accuracy of the session's adapter."""
        batches = self.eval_batches(examples)
        if self.task.loss == "label-words":
            found = self.session.evaluate(batches, label_ids=self.task.label_ids)
            correct = found.correct
        else:
            found = self.session.evaluate(batches)
            correct = self._correct(examples)
        return Score(found.loss or 0.0, (correct or 0) / len(examples), correct or 0, len(examples))

    def _correct(self, examples: Sequence[Example]) -> int:
        from runtime_driver.evaluation import classify

        right = 0
        for group in in_order(examples, self.session.manifest.batch.size):
            logits = self.session.predict(self.encoder.prompts([example.prompt for example in group]))
            predicted = classify(logits, self.task.label_ids).tolist()
            right += sum(guess == example.label for guess, example in zip(predicted, group, strict=True))
        return right


def load_backends(libraries: Sequence[Path] | None) -> None:
    """Load the libraries of ``--backend-library``. Raises :class:`runtime_driver.BackendLibraryError`."""
    for library in libraries or ():
        from runtime_driver import load_backend_library

        load_backend_library(library)


def open_session(
    path: Path,
    weights_file: Path | None = None,
    *,
    verify: bool = True,
    backends: Sequence[Path] | None = None,
) -> Session:
    """Open a program; with ``verify``, its hash is checked first. ``backends``: libraries to load before.

    Raises:
        MissingPackageError: ExecuTorch is not installed.
        runtime_driver.DriverError, runtime_driver.format.ManifestError: the file cannot be used.
    """
    with needs("executorch", "cli"):
        from runtime_driver import Session

        load_backends(backends)
        return Session(path, weights_file, verify=verify)


def open_task(
    path: Path,
    weights_file: Path | None = None,
    *,
    verify: bool = True,
    backends: Sequence[Path] | None = None,
) -> Use:
    """Open a program and its tokenizer.

    Raises:
        mobizo_cli.errors.ModelError: no text task in the manifest, or no tokenizer beside the file.
    """
    session = open_session(path, weights_file, verify=verify, backends=backends)
    task = TextTask.of(session.manifest, path)
    directory = tokenizer_files.find(path, task.tokenizer, task.tokenizer_sha256)
    if task.tokenizer_sha256:
        tokenizer_files.check(directory, task.tokenizer_sha256)
    elif session.manifest.format_version > 1:  # Of format 1 the driver has said it.
        note(f"{path} has no hash of its tokenizer: only the label words are compared")
    tokenizer = load_tokenizer(directory)
    # Another tokenizer beside the file would silently train on other prompts.
    if label_ids(tokenizer, task.label_words) != task.label_ids:
        raise ModelError(f"{directory}: not the tokenizer that the program was lowered with.")
    return Use(session, task, PromptEncoder(tokenizer, task.label_ids, task.loss, task.max_length))
