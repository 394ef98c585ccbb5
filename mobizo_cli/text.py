"""Prompts as token tensors, with the `tokenizers` package alone."""

from __future__ import annotations

from collections.abc import Sequence
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
    except Exception as error:
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


class PromptEncoder:
    """Turns prompts into fixed-length tensors, padded and cut on the left so that the prompt's end survives."""

    def __init__(self, tokenizer: Tokenizer, label_ids: Sequence[int], loss: LossKind, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._label_ids = tuple(label_ids)
        self._loss: LossKind = loss
        self._length = max_length

    def prompts(self, prompts: Sequence[str], *, length: int | None = None) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64[B, T]; the last position is the prompt's last token."""
        import torch

        width = self._length if length is None else length
        rows = [self._tokens(prompt, width) for prompt in prompts]
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

        if self._loss == "label-words":
            return {**self.prompts(prompts), "label": torch.tensor(list(labels))}
        words = torch.tensor([self._label_ids[label] for label in labels]).unsqueeze(1)
        encoded = self.prompts(prompts, length=self._length - 1)
        ignored = torch.full((len(prompts), self._length - 1), IGNORED)
        return {
            "input_ids": torch.cat([encoded["input_ids"], words], 1),
            "attention_mask": torch.cat([encoded["attention_mask"], torch.ones_like(words)], 1),
            "labels": torch.cat([ignored, words], 1),
        }

    def _tokens(self, prompt: str, width: int) -> list[int]:
        encoding = self._tokenizer.encode(prompt)
        marks = encoding.special_tokens_mask
        start = next((i for i, mark in enumerate(marks) if not mark), len(marks))
        # A beginning-of-text token stays in front; an appended one would stand where the label word belongs.
        body = [token for token, mark in zip(encoding.ids[start:], marks[start:], strict=True) if not mark]
        prefix = encoding.ids[:start]
        room = width - len(prefix)
        return prefix + body[-room:] if room > 0 else body[-width:]
