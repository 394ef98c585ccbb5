"""A random two-layer Llama with a word-level tokenizer, saved as transformers saves models, and a little data."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = ["[UNK]", "[PAD]", "It", "was", "terrible", "great", "a", "film", "the", "best", "worst", "ever", "text"]


def save_model(directory: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def save_rows(path: Path, count: int, seed: int) -> Path:
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.randrange(2)
        words = [*chance.choices(["a", "film", "the", "ever"], k=chance.randint(2, 6)), ["worst", "best"][label]]
        rows.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    path.write_text("".join(rows))
    return path
