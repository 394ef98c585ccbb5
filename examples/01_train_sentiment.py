"""What `make demo` runs: SmolLM2-135M learns the sentiment of film reviews, by forward passes only, inside a .pte.

One process compiles: the packaged model with a PEFT LoRA on its upper layers becomes a training-step program on
ExecuTorch's XNNPACK delegate. Then this process, which never imports transformers, peft or the compiler, trains with
the .pte and the driver alone, and says in a closing table what happened.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from examples.packaged import Sentence, load_sentences, model_directory
from mobizo_cli.task import TextTask
from mobizo_cli.text import TOKENIZER_FILE, PromptEncoder, label_ids, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    import mobizo_passes as mz

PROMPT = "{text} It was"
WORDS = (" terrible", " great")  # by label: 0 is negative, 1 is positive
QUERIES, BATCH, TOKENS, RANK = 4, 4, 32, 16
LAYERS, UPPER_LAYERS = 30, 15  # what lies below the first LoRA is computed once, not once per perturbation
LEARNING_RATE, EPSILON, STEPS = 1e-2, 1e-2, 300
EVALUATE_EVERY = 100


def word_ids() -> list[int]:
    """The token of each label's word."""
    return list(label_ids(load_tokenizer(model_directory()), WORDS))


def batches(sentences: Sequence[Sentence]) -> list[dict[str, Tensor]]:
    """The sentences in order, `BATCH` at a time: `input_ids`, `attention_mask` int64[B, TOKENS], `label` int64[B].

    Prompts are padded on the left, so that their last token is always at the last position.
    """
    encode = PromptEncoder(load_tokenizer(model_directory()), word_ids(), "label-words", TOKENS)
    groups = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
    return [encode.batch([PROMPT.format(text=s.text) for s in g], [int(s.positive) for s in g]) for g in groups]


def example_batch() -> dict[str, Tensor]:
    """A batch with the shapes to compile for."""
    return batches(load_sentences(held_out=0).train[:BATCH])[0]


def build_program() -> mz.TrainingProgram:
    """The packaged model with a LoRA, as a training-step program."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model

    import mobizo_passes as mz
    from examples.packaged import load_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(LAYERS - UPPER_LAYERS, LAYERS)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(), config).eval()
    ids = word_ids()

    def loss(outputs: Any, label: Tensor) -> Tensor:
        """Cross-entropy over the two words only: far easier to learn than over 49,152."""
        return F.cross_entropy(outputs.logits[:, -1, ids], label)

    # The prompt ends at the last position, so logits are needed nowhere else.
    inputs = {**example_batch(), "logits_to_keep": 1}
    return mz.transform(model, inputs, estimator=mz.TwoSided(queries=QUERIES), loss=loss)


def compile_program(path: Path) -> None:
    """Lower the program to a .pte at `path`. Runs in a process of its own: its memory is not the training's."""
    import lowering

    tokenizer = path.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    shutil.copy(model_directory() / TOKENIZER_FILE, tokenizer)
    # What `mobizo eval` and `mobizo train` need to make prompts for this program.
    task = TextTask(
        template=PROMPT,
        label_column="label",
        label_values=("0", "1"),
        label_words=WORDS,
        label_ids=tuple(word_ids()),
        loss="label-words",
        max_length=TOKENS,
        tokenizer=tokenizer.name,
    )
    lowered = lowering.lower(build_program(), target="xnnpack", application=task.application())
    lowered.save(path)
    path.with_suffix(".report.txt").write_text(f"{lowered.report}\n", encoding="utf-8")
    path.with_suffix(".report.json").write_text(json.dumps(lowered.report.to_dict()), encoding="utf-8")


def log_to(path: Path) -> None:
    """Send this process's standard error, where libraries talk about themselves, to a file."""
    with path.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)


def compile_elsewhere(path: Path) -> None:
    """Run `compile_program` in a fresh process and wait for it; what libraries say goes to `compile.log`."""
    context = multiprocessing.get_context("spawn")
    log = path.with_name("compile.log")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=log_to, initargs=(log,)) as pool:
        pool.submit(compile_program, path).result()


@dataclass
class Curve:
    """What the picture shows; points are (completed steps, value)."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)


def train(path: Path, out: Path, options: argparse.Namespace, console: Console) -> tuple[Curve, int]:
    """Train with the .pte and the driver alone; returns the curve and the peak memory in bytes."""
    import runtime_driver

    split = load_sentences(held_out=options.eval_size)
    held_out = batches(split.held_out)
    order = list(split.train)
    random.Random(options.seed).shuffle(order)
    session = runtime_driver.Session(path)
    words = word_ids()
    curve = Curve()

    def evaluate(step: int) -> None:
        # Only one method at a time: each keeps its own packed copy of the weights while it is loaded.
        session.release()
        accuracy = session.evaluate(held_out, label_ids=words, loss=False).accuracy
        assert accuracy is not None
        session.release()
        curve.accuracy.append((step, accuracy))
        console.print(f"accuracy after {step} steps, on {len(split.held_out)} held-out sentences: {accuracy:.3f}")

    class Recorder(runtime_driver.Callback):
        def on_step(self, record: runtime_driver.StepRecord) -> None:
            curve.losses.append(record.loss)
            curve.seconds.append(record.seconds)
            done = record.step + 1
            if done % EVALUATE_EVERY == 0 or done == options.steps:
                evaluate(done)

    evaluate(0)
    session.fit(
        batches(order[: options.steps * BATCH]),
        steps=options.steps,
        lr=LEARNING_RATE,
        eps=EPSILON,
        seed=options.seed,
        journal=out / "journal.jsonl",
        callbacks=[Recorder()],
    )
    session.save_adapter(out / "adapter")
    return curve, runtime_driver.peak_rss_bytes()


def draw(curve: Curve, path: Path) -> None:
    """The loss of every step, its running mean, and the accuracy, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = 20
    smooth = [statistics.fmean(curve.losses[max(0, i - window + 1) : i + 1]) for i in range(len(curve.losses))]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = range(1, len(curve.losses) + 1)
    top.plot(steps, curve.losses, color="#b8c4d6", linewidth=1, label="each step")
    top.plot(steps, smooth, color="#1f4e8c", linewidth=2, label=f"mean of the last {window} steps")
    top.set(ylabel="training loss (two words)", title="SmolLM2-135M learns film-review sentiment by forward passes")
    top.legend(frameon=False)
    bottom.plot(*zip(*curve.accuracy, strict=True), marker="o", color="#b0413e")
    bottom.axhline(0.5, color="#999999", linestyle="--", linewidth=1)
    bottom.set(xlabel="step", ylabel="accuracy on held-out sentences")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--eval-size", type=int, default=400, help="held-out sentences, never trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the order of sentences")
    parser.add_argument("--program", type=Path, help="a sentiment.pte of an earlier run; default: compile one")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="directory for all that it writes")
    options = parser.parse_args()
    if options.steps < 1 or options.eval_size < 1:
        parser.error("--steps and --eval-size must be at least 1")
    console = Console() if Console().is_terminal else Console(width=100)
    started = time.monotonic()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    # A journal of an earlier run would be resumed, and the curve would miss what came before.
    for stale in out.glob("journal.jsonl*"):
        stale.unlink()
    program: Path = options.program or out / "sentiment.pte"
    if options.program is None:
        console.print(f"compiling SmolLM2-135M, LoRA on its upper {UPPER_LAYERS} of {LAYERS} layers, for XNNPACK")
        compile_elsewhere(program)
    report = json.loads(program.with_suffix(".report.json").read_text(encoding="utf-8"))
    compiled = time.monotonic() - started
    console.print(
        f"compiled in {compiled:.0f} s; training for {options.steps} steps of {2 * QUERIES} × {BATCH} sentences"
    )
    curve, peak = train(program, out, options, console)
    draw(curve, out / "curve.png")

    table = Table(title="What happened", show_header=False)
    before, after = curve.accuracy[0][1], curve.accuracy[-1][1]
    for name, value in {
        f"accuracy before, {options.eval_size} held-out sentences": f"{before:.3f}",
        "accuracy after": f"{after:.3f} ({(after - before) * 100:+.1f} points)",
        "steps": f"{options.steps}",
        "time per step (median)": f"{statistics.median(curve.seconds):.2f} s",
        "peak memory of training": f"{peak / 2**20:.0f} MiB",
        ".pte size": f"{program.stat().st_size / 2**20:.0f} MiB",
        "partitions in `step`": f"{report['methods']['step']['partitions']}",
        "compiling": f"{compiled:.0f} s",
        "all in all": f"{time.monotonic() - started:.0f} s",
        "program, report": f"{program}, {program.with_suffix('.report.txt').name}",
        "PEFT adapter": f"{out / 'adapter'}",
        "journal": f"{out / 'journal.jsonl'}",
        "picture": f"{out / 'curve.png'}",
    }.items():
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    main()
