"""Lower tiny models of four families for every target, run what runs here, and tell how far the numbers are off.

    python benchmarks/targets.py [--write docs/targets.md] [--full] [--only MODEL ...] [--target TARGET ...]
        [--estimator forward-gradient]

Every target that can be lowered to here has one column of settings for each of its precisions. Errors are those of one
step against the eager program: where a target's runtime is here, of the .pte; else, in brackets, of the legalized and
partitioned graph run in PyTorch, rounded as the delegate would round it (see `lowering.simulate`).
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mobizo_passes as mz
    from lowering.report import MethodReport

QUERIES = 2
ESTIMATORS = ("two-sided", "forward-gradient")
# What would take hours: QNN's simulator, on a model of the demo's size.
UNRUNNABLE = {("SmolLM2-135M", "qnn")}
MARK = "<!-- written by benchmarks/targets.py: everything below -->"


@dataclass(frozen=True)
class Setting:
    """A target with its options."""

    target: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return " ".join([self.target, *self.options.values()])

    def calibration(self, inputs: Any) -> list[Any] | None:
        """The batch that is compared, where ranges have to be measured."""
        from lowering.targets import get_target

        return [inputs] if get_target(self.target).configured(self.options).quantizes else None


@dataclass(frozen=True)
class Row:
    """What one model became for one target. Errors are relative to the largest loss or projected gradient.

    `loss_error` and `gradient_error` are None where nothing was run.
    """

    model: str
    setting: str
    partitions: int
    share: float
    loss_error: float | None
    gradient_error: float | None
    seconds: float
    megabytes: float
    ran: bool
    outside: tuple[str, ...]


def settings(only: list[str]) -> Iterator[Setting]:
    """Every target that can be lowered to here, once for each of its precisions."""
    from lowering.targets import TARGETS

    for name, target in TARGETS.items():
        if (only and name not in only) or not target.availability().ready:
            continue
        if len(target.precisions) > 1:
            yield from (Setting(name, {"precision": each}) for each in target.precisions)
        else:
            yield Setting(name, {})


def models(full: bool) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name -> a function that gives a model with LoRA and its example inputs."""
    from tests.coverage.hf_rows import ENCODER, IMAGES, LLAMA, build, classified, pictured
    from tests.models import llama_inputs

    gpt2 = {"vocab_size": 19, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
    encoder, images = "ForSequenceClassification", "ForImageClassification"
    found: dict[str, Callable[[], tuple[Any, Any]]] = {
        "Llama": lambda: (build("Llama", ["q_proj", "v_proj"], LLAMA), llama_inputs()),
        "GPT-2": lambda: (build("GPT2", ["c_attn"], gpt2, "LMHeadModel", fan_in_fan_out=True), llama_inputs()),
        "BERT": lambda: (build("Bert", ["query", "value"], ENCODER, encoder), classified()),
        "ViT": lambda: (build("ViT", ["q_proj", "v_proj", "query", "value"], IMAGES, images), pictured()()),
    }
    if full:
        from benchmarks.task import Task, load_lora_model, make_batch

        small = Task(batch=2, tokens=32)
        found["SmolLM2-135M"] = lambda: (load_lora_model(small), make_batch(small))
    return found


def measure(name: str, program: mz.TrainingProgram, inputs: Any, setting: Setting) -> Row:
    """Lower for one target; run a step, or simulate it where the target's runtime is not here."""
    import lowering

    started = time.perf_counter()
    calibration = setting.calibration(inputs)
    lowered = lowering.lower(program, target=setting.target, calibration=calibration, **setting.options)
    seconds = time.perf_counter() - started
    losses = gradients = None
    ran = False
    if (name, setting.target) not in UNRUNNABLE:
        found = lowering.fidelity(lowered, program, [inputs], calibration)
        losses, gradients, ran = found.loss_error, found.gradient_error, not found.simulated
    step = lowered.report.methods["step"]
    size = lowered.report.program_bytes / 2**20
    share = step.delegated_share
    return Row(name, str(setting), step.partitions, share, losses, gradients, seconds, size, ran, outside(step))


def outside(step: MethodReport) -> tuple[str, ...]:
    """The products that no delegate took, and why."""
    if not step.partitions:
        return ()
    return tuple(f"{node.op} of {node.origin or 'the step'}: {node.reason}" for node in step.portable if node.flops)


def document(rows: list[Row]) -> str:
    """The table, as Markdown."""
    head = ["model", "target", "partitions", "FLOPs delegated", "losses off by", "projected gradients off by"]
    head += ["lowering (s)", ".pte (MiB)", "ran here"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'--:|' * 6}---|"]
    for row in rows:
        errors = [shown(each, row.ran) for each in (row.loss_error, row.gradient_error)]
        cells = [row.model, row.setting, row.partitions, f"{row.share:.1%}" if row.partitions else "–", *errors]
        cells += [f"{row.seconds:.0f}", f"{row.megabytes:.2f}", "yes" if row.ran else "no"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    left = [f"- {row.model}, {row.setting}: {each}." for row in rows for each in row.outside]
    lines += ["", "Matrix products outside of the delegate:", "", *(left or ["- none."])]
    return "\n".join(lines) + "\n"


def shown(error: float | None, ran: bool) -> str:
    """An error, in brackets where another runtime stood in for the target's."""
    if error is None:
        return "–"
    return f"{error:.0e}" if ran else f"({error:.0e})"


def write(path: Path, text: str) -> None:
    """Replace what stands below the mark."""
    before = path.read_text(encoding="utf-8").split(MARK)[0]
    path.write_text(f"{before}{MARK}\n\n{text}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Lower tiny models for every target and compare their numbers.")
    parser.add_argument("--write", type=Path, help="the document whose table to replace")
    parser.add_argument("--full", action="store_true", help="the demo's model too (minutes)")
    parser.add_argument("--only", nargs="*", default=[], help="models")
    parser.add_argument("--target", nargs="*", default=[], help="targets")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="two-sided", help="what projected gradients are")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    import mobizo_passes as mz

    kind = {"two-sided": mz.TwoSided, "forward-gradient": mz.ForwardGradient}[options.estimator]
    rows: list[Row] = []
    for name, make in models(options.full).items():
        if options.only and name not in options.only:
            continue
        model, inputs = make()
        program = mz.transform(model, inputs, estimator=kind(queries=QUERIES))
        for setting in settings(options.target):
            rows.append(measure(name, program, inputs, setting))
            print(rows[-1], flush=True)
    text = document(rows)
    print(text)
    if options.write is not None:
        write(options.write, text)


if __name__ == "__main__":
    main()
