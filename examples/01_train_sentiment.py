"""What `make demo` runs: SmolLM2-135M learns the sentiment of film reviews inside a .pte, in two ways.

First it compiles: the packaged model with a PEFT LoRA on its upper layers becomes two training-step programs on
ExecuTorch's XNNPACK delegate. One follows the exact gradient with AdamW, which learns most in its time; the other needs
forward passes only, and takes derivatives along random directions. Then each trains in a process that never imports
transformers, peft or the compiler, with its .pte and the driver alone. A closing table says what happened.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

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
LAYERS, UPPER_LAYERS = 30, 15  # what lies below the first LoRA has no gradient, and is not perturbed


@dataclass(frozen=True)
class Way:
    """One way to train: what the program does, and for how long."""

    name: str
    what: str
    steps: int
    learning_rate: float
    color: str


EXACT = Way("exact", "exact gradient, AdamW", 200, 5e-4, "#1f4e8c")
FORWARD_ONLY = Way("forward-only", f"forward passes only, {QUERIES} queries", 180, 1e-2, "#b0413e")
WAYS = (EXACT, FORWARD_ONLY)


def word_ids() -> list[int]:
    """The token of each label's word."""
    return list(label_ids(load_tokenizer(model_directory()), WORDS))


def batches(sentences: Sequence[Sentence], size: int = BATCH) -> list[dict[str, Tensor]]:
    """The sentences in order, `size` at a time: `input_ids`, `attention_mask` int64[B, TOKENS], `label` int64[B].

    Prompts are padded on the left, so that their last token is always at the last position.
    """
    encode = PromptEncoder(load_tokenizer(model_directory()), word_ids(), "label-words", TOKENS)
    groups = [sentences[start : start + size] for start in range(0, len(sentences), size)]
    return [encode.batch([PROMPT.format(text=s.text) for s in g], [int(s.positive) for s in g]) for g in groups]


def example_batch(size: int = BATCH) -> dict[str, Tensor]:
    """A batch with the shapes to compile for."""
    return batches(load_sentences(held_out=0).train[:size], size)[0]


def build_program(
    way: Way,
    upper_layers: int = UPPER_LAYERS,
    directory: Path | None = None,
    estimator: mz.Estimator | None = None,
    batch: int = BATCH,
) -> mz.TrainingProgram:
    """The packaged model, or another Llama, with a LoRA on its upper layers, as a training-step program.

    `estimator` takes the place of directional derivatives.
    """
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model

    import mobizo_passes as mz
    from examples.packaged import load_model

    base = load_model(directory)
    layers = base.config.num_hidden_layers
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(layers - upper_layers, layers)),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).eval()
    ids = word_ids()

    def loss(outputs: Any, label: Tensor) -> Tensor:
        """Cross-entropy over the two words only: far easier to learn than over 49,152."""
        return F.cross_entropy(outputs.logits[:, -1, ids], label)

    # The prompt ends at the last position, so logits are needed nowhere else.
    inputs = {**example_batch(batch), "logits_to_keep": 1}
    if way == EXACT:
        both = "lora_A+lora_B"
        return mz.transform(model, inputs, estimator=mz.Exact(), optimizer=mz.AdamW(), trainable=both, loss=loss)
    return mz.transform(model, inputs, estimator=estimator or mz.ForwardGradient(QUERIES), loss=loss)


def compile_program(
    out: Path,
    way: Way,
    upper_layers: int = UPPER_LAYERS,
    directory: Path | None = None,
    estimator: mz.Estimator | None = None,
) -> None:
    """Lower the program to a .pte in `out`, in a process of its own; what libraries say is logged there."""
    log_to(out / f"{way.name}.compile.log")
    import lowering

    tokenizer = out / "tokenizer"
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
    program = build_program(way, upper_layers, directory, estimator)
    lowered = lowering.lower(program, target="xnnpack", application=task.application())
    path = program_path(out, way)
    lowered.save(path)
    path.with_suffix(".report.txt").write_text(f"{lowered.report}\n", encoding="utf-8")
    path.with_suffix(".report.json").write_text(json.dumps(lowered.report.to_dict()), encoding="utf-8")


def program_path(directory: Path, way: Way) -> Path:
    """Where the program of this way is."""
    return directory / f"{way.name}.pte"


P = ParamSpec("P")
R = TypeVar("R")


def log_to(path: Path) -> None:
    """Send this process's standard error, where libraries talk about themselves, to a file."""
    with path.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 2)


def elsewhere(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function in a fresh process and wait for it: its memory is its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


@dataclass
class Curve:
    """What a run gives; points of `accuracy` are (completed steps, value)."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    peak_bytes: int = 0


def train(program: Path, out: Path, way: Way, steps: int, eval_size: int, seed: int) -> Curve:
    """Train with the .pte and the driver alone; measure accuracy at the end, and for the first way before."""
    import runtime_driver

    split = load_sentences(held_out=eval_size)
    held_out = batches(split.held_out)
    order = list(split.train)
    random.Random(seed).shuffle(order)
    session = runtime_driver.Session(program)
    words = word_ids()
    curve = Curve()

    def evaluate(step: int) -> None:
        # Only one method at a time: each keeps its own packed copy of the weights while it is loaded.
        session.release()
        accuracy = session.evaluate(held_out, label_ids=words, loss=False).accuracy
        assert accuracy is not None
        session.release()
        curve.accuracy.append((step, accuracy))

    class Recorder(runtime_driver.Callback):
        def on_step(self, record: runtime_driver.StepRecord) -> None:
            curve.losses.append(record.loss)
            curve.seconds.append(record.seconds)
            if record.step + 1 in halves:
                evaluate(record.step + 1)

    # lora_B starts at zero: before training, all are equal. What learns fast is looked at halfway, too.
    halves = (steps // 2, steps) if way == EXACT else (steps,)
    if way == EXACT:
        evaluate(0)
    session.fit(
        batches(order[: steps * BATCH]),
        steps=steps,
        lr=way.learning_rate,
        seed=seed,
        journal=out / "journal.jsonl",
        callbacks=[Recorder()],
    )
    session.save_adapter(out / "adapter")
    curve.peak_bytes = runtime_driver.peak_rss_bytes()
    return curve


def draw(curves: dict[Way, Curve], path: Path) -> None:
    """The running mean of each run's loss, and accuracy, over the time spent in steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = 20
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    start = curves[EXACT].accuracy[0]
    for way, curve in curves.items():
        elapsed = [0.0, *accumulate(curve.seconds)]
        smooth = [statistics.fmean(curve.losses[max(0, i - window + 1) : i + 1]) for i in range(len(curve.losses))]
        points = sorted({start, *curve.accuracy})
        top.plot(elapsed[1:], smooth, color=way.color, linewidth=2, label=way.what)
        at = [elapsed[step] for step, _ in points]
        bottom.plot(at, [value for _, value in points], color=way.color, marker="o", label=way.what)
    top.set(ylabel=f"training loss, mean of {window} steps", title="SmolLM2-135M learns film-review sentiment")
    top.legend(frameon=False)
    bottom.axhline(0.5, color="#999999", linestyle="--", linewidth=1)
    bottom.set(xlabel="seconds spent in steps", ylabel="accuracy on held-out sentences")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def closing_table(curves: dict[Way, Curve], programs: Path, out: Path, eval_size: int) -> Table:
    """What happened, a column for each way."""
    before = curves[EXACT].accuracy[0][1]
    table = Table(title=f"What happened; accuracy {before:.3f} before, on {eval_size} held-out sentences")
    table.add_column("")
    columns: list[list[tuple[str, str]]] = []
    for way, curve in curves.items():
        table.add_column(way.what)
        after = curve.accuracy[-1][1]
        program = program_path(programs, way)
        report = json.loads(program.with_suffix(".report.json").read_text(encoding="utf-8"))
        columns.append(
            [
                ("accuracy after", f"{after:.3f} ({(after - before) * 100:+.1f} points)"),
                ("steps", f"{len(curve.losses)}"),
                ("time per step (median)", f"{statistics.median(curve.seconds):.2f} s"),
                ("time in steps", f"{sum(curve.seconds):.0f} s"),
                ("peak memory of training", f"{curve.peak_bytes / 2**20:.0f} MiB"),
                (".pte size", f"{program.stat().st_size / 2**20:.0f} MiB"),
                ("partitions in `step`", f"{report['methods']['step']['partitions']}"),
                ("program", f"{program}"),
                ("PEFT adapter", f"{out / way.name / 'adapter'}"),
                ("journal", f"{out / way.name / 'journal.jsonl'}"),
            ]
        )
    for cells in zip(*columns, strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, help="of each way; default: what each has time for")
    parser.add_argument("--eval-size", type=int, default=400, help="held-out sentences, never trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and of the order of sentences")
    parser.add_argument("--programs", type=Path, help="directory with the programs of an earlier run; default: compile")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="directory for all that it writes")
    options = parser.parse_args()
    if (options.steps is not None and options.steps < 1) or options.eval_size < 1:
        parser.error("--steps and --eval-size must be at least 1")
    console = Console() if Console().is_terminal else Console(width=120)
    started = time.monotonic()
    out: Path = options.out
    programs: Path = options.programs or out
    for way in WAYS:
        (out / way.name).mkdir(parents=True, exist_ok=True)
        # A journal of an earlier run would be resumed, and the curve would miss what came before.
        for stale in (out / way.name).glob("journal.jsonl*"):
            stale.unlink()
    if options.programs is None:
        console.print(
            f"compiling SmolLM2-135M, LoRA on its upper {UPPER_LAYERS} of {LAYERS} layers, for XNNPACK, twice"
        )
        for way in WAYS:
            elsewhere(compile_program, programs, way)
        console.print(f"compiled in {time.monotonic() - started:.0f} s")
    curves: dict[Way, Curve] = {}
    for way in WAYS:
        steps: int = options.steps or way.steps
        console.print(f"training: {way.what}, {steps} steps")
        program = program_path(programs, way)
        curves[way] = elsewhere(train, program, out / way.name, way, steps, options.eval_size, options.seed)
        for step, accuracy in curves[way].accuracy:
            console.print(f"accuracy after {step} steps: {accuracy:.3f}")
    draw(curves, out / "curve.png")
    console.print(closing_table(curves, programs, out, options.eval_size))
    console.print(f"picture: {out / 'curve.png'}; all in all {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
