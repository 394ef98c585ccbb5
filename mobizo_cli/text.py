"""Prompts as token tensors, with the `tokenizers` package alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobizo_cli.errors import MissingPackageError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from mobizo_cli.task import LossKind

TOKENIZER_FILE = "tokenizer.json"
#: What cross-entropy ignores, in Hugging Face's models and in torch.
IGNORED = -100


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in ``directory/tokenizer.json``.

    Raises:
        MissingPackageError: `tokenizers` is not installed.
        ModelError: no such file, or not a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError("tokenizers", "cli") from error
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Keep the tokenizer's directory beside the .pte, as `lower` wrote it.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:
        # A panic of the library's Rust code is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{path}: not a tokenizer ({error}). Lower the model again.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def label_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[int, ...]:
    """The token of each word.

    Raises:
        ModelError: a word is several tokens or unknown, or two words are the same token.
    """
    unknown = getattr(tokenizer.model, "unk_token", None)
    ids: list[int] = []
    for word in words:
        encoding = tokenizer.encode(word, add_special_tokens=False)
        if len(encoding.ids) != 1:
            raise ModelError(
                f"the label word {word!r} is {len(encoding.ids)} tokens {encoding.tokens}, expected one. "
                "Choose another word; whether it starts with a space matters."
            )
        if encoding.tokens == [unknown]:
            raise ModelError(f"the label word {word!r} is not in the tokenizer's vocabulary. Choose another word.")
        if encoding.ids[0] in ids:
            other = words[ids.index(encoding.ids[0])]
            raise ModelError(f"the label words {other!r} and {word!r} are the same token {encoding.tokens}.")
        ids.append(encoding.ids[0])
    return tuple(ids)


@dataclass(frozen=True)
class _Tokens:
    """A prompt's tokens: the special ones in front, and as many of the others, from the end, as a program can take."""

    prefix: list[int]
    body: list[int]
    count: int


class PromptEncoder:
    """Turns prompts into fixed-length tensors, padded and cut on the left so that the prompt's end survives.

    Each prompt is tokenized once, when it is first seen.
    """

    def __init__(self, tokenizer: Tokenizer, label_ids: Sequence[int], loss: LossKind, max_length: int) -> None:
        self._tokenizer = tokenizer
        self.label_ids = tuple(label_ids)
        self._loss: LossKind = loss
        self._length = max_length
        self._known: dict[str, _Tokens] = {}

    @property
    def prompt_length(self) -> int:
        """Tokens that a training prompt may have; with the vocabulary loss the label's word takes the last place."""
        return self._length if self._loss == "label-words" else self._length - 1

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a training prompt, cut to the program's length."""
        return self._cut(prompt, self.prompt_length)

    def count(self, prompt: str) -> int:
        """How many tokens the whole prompt has."""
        return self._encoded(prompt).count

    def prompts(self, prompts: Sequence[str], *, length: int | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64[B, T]; the last position is the prompt's last token."""
        import torch

        width = self._length if length is None else length
        rows = [self._cut(prompt, width) for prompt in prompts]
        # The padding's token is never read: its positions are masked.
        ids = [[0] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def batch(self, prompts: Sequence[str], labels: Sequence[int]) -> dict[str, Tensor]:
        """A batch for training: the prompts with their labels.

        ``label`` is int64[B], a label's number. For the vocabulary loss it is ``labels``, int64[B, T]: the label's word
        is then the last token of the input, and the only labelled position.
        """
        import torch

        encoded = self.prompts(prompts, length=self.prompt_length)
        if self._loss == "label-words":
            return {**encoded, "label": torch.tensor(list(labels))}
        words = torch.tensor([self.label_ids[label] for label in labels]).unsqueeze(1)
        ignored = torch.full((len(prompts), self.prompt_length), IGNORED)
        return {
            "input_ids": torch.cat([encoded["input_ids"], words], 1),
            "attention_mask": torch.cat([encoded["attention_mask"], torch.ones_like(words)], 1),
            "labels": torch.cat([ignored, words], 1),
        }

    def _cut(self, prompt: str, width: int) -> list[int]:
        tokens = self._encoded(prompt)
        room = width - len(tokens.prefix)
        return tokens.prefix + tokens.body[-room:] if room > 0 else tokens.body[-width:]

    def _encoded(self, prompt: str) -> _Tokens:
        if prompt not in self._known:
            encoding = self._tokenizer.encode(prompt)
            marks, ids = encoding.special_tokens_mask, encoding.ids
            start = next((i for i, mark in enumerate(marks) if not mark), len(marks))
            # A beginning-of-text token stays in front; an appended one would stand where the label word belongs.
            body = [token for token, mark in zip(ids[start:], marks[start:], strict=True) if not mark]
            self._known[prompt] = _Tokens(ids[:start], body[-self._length :], start + len(body))
        return self._known[prompt]
