"""What the contenders learn: sentences and the word that should follow each."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from examples.packaged import load_sentences, model_directory
from mobizo_cli.text import PromptEncoder, label_ids, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 4
# Sentences that no run trains on: those that results are measured on, and those that learning rates are chosen on.
HELD_OUT, DEVELOPMENT = 1000, 400


@dataclass(frozen=True)
class Example:
    """A text with its label, an index into the task's words."""

    text: str
    label: int


@dataclass(frozen=True)
class Split:
    """Examples to train on, to choose learning rates on, and to measure on."""

    train: Sequence[Example]
    development: Sequence[Example]
    held_out: Sequence[Example]


@dataclass(frozen=True)
class Task:
    """Classification by the word after a prompt.

    Attributes:
        words: by label, one token each.
        tokens: length of a prompt; longer ones lose their beginning, shorter ones are padded on the left.
        target: the accuracy whose cost is reported.
    """

    name: str
    what: str
    template: str
    words: tuple[str, ...]
    tokens: int
    target: float
    load: Callable[[], Sequence[Example]]

    def split(self) -> Split:
        """The first `HELD_OUT` examples, the next `DEVELOPMENT` ones, and the rest."""
        examples = self.load()
        edge = HELD_OUT + DEVELOPMENT
        return Split(examples[edge:], examples[HELD_OUT:edge], examples[:HELD_OUT])

    def encoder(self) -> PromptEncoder:
        tokenizer = load_tokenizer(model_directory())
        return PromptEncoder(tokenizer, label_ids(tokenizer, self.words), "label-words", self.tokens)

    def batches(self, examples: Sequence[Example], size: int = BATCH) -> list[dict[str, Tensor]]:
        """`input_ids` and `attention_mask` int64[B, tokens], `label` int64[B], in order; the last one may be short."""
        encoder = self.encoder()
        groups = (examples[start : start + size] for start in range(0, len(examples), size))
        return [self._batch(encoder, group) for group in groups]

    def training_batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Full batches of the training examples, over and over, in the order of this seed: the same for everyone."""
        encoder = self.encoder()
        order = list(self.split().train)
        random.Random(seed).shuffle(order)
        while True:
            for start in range(0, len(order) - BATCH + 1, BATCH):
                yield self._batch(encoder, order[start : start + BATCH])

    def _batch(self, encoder: PromptEncoder, examples: Sequence[Example]) -> dict[str, Tensor]:
        return encoder.batch([self.template.format(text=e.text) for e in examples], [e.label for e in examples])


def sentiment() -> Sequence[Example]:
    """The demo's sentences, in the demo's order."""
    split = load_sentences(held_out=HELD_OUT + DEVELOPMENT)
    return [Example(s.text, int(s.positive)) for s in (*split.held_out, *split.train)]


def long_reviews() -> Sequence[Example]:
    """IMDb reviews, shuffled."""
    split = load_sentences(held_out=HELD_OUT + DEVELOPMENT, source="imdb")
    return [Example(s.text.replace("<br />", " "), int(s.positive)) for s in (*split.held_out, *split.train)]


TASKS = {
    task.name: task
    for task in (
        Task(
            "sentiment",
            "Rotten Tomatoes sentences, good or bad (the demo's task)",
            "{text} It was",
            (" terrible", " great"),
            32,
            0.8,
            sentiment,
        ),
        Task(
            "long-reviews",
            "IMDb reviews, the last 64 tokens, good or bad",
            "{text} It was",
            (" terrible", " great"),
            64,
            0.85,
            long_reviews,
        ),
    )
}
