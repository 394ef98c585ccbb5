"""Time one training step, side by side with every way we know of doing the same without us.

    python benchmarks/step_time.py [--rounds 5] [--only NAME ...]

Every contender lives in its own process and waits for its turn; only one computes at a time, and rounds interleave
(A B C A B C ...), so that a machine that slows down slows everybody down. A best far below the median
means that the machine was not idle; CPU seconds, of all threads of the process, hardly depend on that. Prints a table,
writes `step_time.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.task import LAYERS, Task

ROOT = Path(__file__).resolve().parent.parent
UPPER = LAYERS // 2


@dataclass(frozen=True)
class Entry:
    """A contender: how to start it and what it computes, in the reader's words."""

    name: str
    what: str
    kind: str
    upper_layers: int | None = None
    estimator: str = "two-sided"
    layers: int = LAYERS


# What the joint graph can be lowered to in minutes: the time grows faster than the layers.
FEW = 4
ENTRIES = (
    Entry("step", f"compiled step, LoRA on all {LAYERS} layers", "step", LAYERS),
    Entry("losses", "2q calls of the compiled loss, no update", "losses", LAYERS),
    Entry("step-upper", f"compiled step, LoRA on the upper {UPPER} layers", "step", UPPER),
    Entry("forward", "compiled step of directional derivatives, all layers", "step", LAYERS, "forward-gradient"),
    Entry("forward-upper", f"the same on the upper {UPPER} layers", "step", UPPER, "forward-gradient"),
    Entry("mezo-eager", "MeZO, PyTorch eager, one forward at a time, lora_B", "mezo-eager"),
    Entry("mezo-eager-label-only", "the same, logits at the label only", "mezo-eager-label-only"),
    Entry("mp-lora-eager", "the paper's MP-LoRA, PyTorch eager, one forward of 2q copies, lora_B", "mp-lora-eager"),
    Entry("exact", f"compiled exact step, AdamW on lora_A and lora_B of all {LAYERS} layers", "step", LAYERS, "exact"),
    Entry("exact-upper", f"the same on the upper {UPPER} layers", "step", UPPER, "exact"),
    Entry("exact-checkpointed", "exact with layer checkpoints", "step", LAYERS, "exact-checkpointed"),
    Entry("exact-few", f"exact on a model of {FEW} layers", "step", FEW, "exact", FEW),
    Entry(
        "joint-graph-few",
        "the same by ExecuTorch's joint graph, SGD",
        "joint-graph",
        FEW,
        "joint-graph",
        FEW,
    ),
    Entry("backprop-eager", "LoRA + AdamW with backprop, PyTorch eager, lora_A and lora_B", "backprop-eager"),
    Entry("backprop-eager-checkpointed", "the same with activation checkpointing", "backprop-eager-checkpointed"),
    Entry("backprop-eager-label-only", "backprop-eager, logits at the label only", "backprop-eager-label-only"),
    Entry(
        "backprop-eager-label-only-upper", f"the same on the upper {UPPER} layers", "backprop-eager-label-only-upper"
    ),
)
# (numerator, denominator, field, bar): what the compiled step is held to.
BARS = (
    ("step", "losses", "seconds", 1.0),
    ("step-upper", "step", "seconds", 0.62),
    ("step", "losses", "peak_bytes", 1.3),
    ("forward", "step", "seconds", 0.7),
    ("forward-upper", "step-upper", "seconds", 0.72),
    ("forward", "step", "peak_bytes", 1.0),
    ("exact", "backprop-eager-label-only", "seconds", 0.55),
    ("exact-upper", "backprop-eager-label-only-upper", "seconds", 0.6),
    ("exact", "step", "seconds", 0.3),
    ("exact-few", "joint-graph-few", "seconds", 0.3),
    ("exact", "backprop-eager", "peak_bytes", 1.0),
    ("exact-checkpointed", "backprop-eager", "peak_bytes", 0.8),
    ("exact-checkpointed", "backprop-eager-checkpointed", "seconds", 0.7),
)


@dataclass
class Worker:
    """A contender's process. There is one figure per timed round, of `peak_bytes` the last one reported."""

    entry: Entry
    process: subprocess.Popen[str]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the contender {self.entry.name!r} ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_bytes = answer["peak_bytes"]
        return answer

    def step(self, timed: bool) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.read()
        if timed:
            self.seconds.append(answer["seconds"])
            self.cpu_seconds.append(answer["cpu_seconds"])
            self.losses.append(answer["loss"])

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(threads: int) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def start(entry: Entry, options: argparse.Namespace, log: Path) -> Worker:
    """Start a contender and wait until it is ready, having compiled its program in another process if it needs one."""
    command = [sys.executable, "-m", "benchmarks.worker", entry.kind]
    env = environment(options.threads)
    with log.open("a", encoding="utf-8") as errors:
        if entry.upper_layers is not None:
            compile_command = [sys.executable, "-m", "benchmarks.compiled", "--target", options.target]
            compile_command += ["--directory", str(options.out / "programs"), "--upper-layers", str(entry.upper_layers)]
            compile_command += ["--estimator", entry.estimator, "--layers", str(entry.layers)]
            made = subprocess.run(compile_command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
            if made.returncode:
                raise RuntimeError(f"compiling for the contender {entry.name!r} failed; see {log}")
            command += ["--program", made.stdout.strip()]
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    worker = Worker(entry, process)
    worker.read()
    return worker


def measure(entries: list[Entry], options: argparse.Namespace, console: Console) -> list[Worker]:
    workers: list[Worker] = []
    log = options.out / "step_time.log"
    try:
        for entry in entries:
            console.print(f"starting {entry.name}")
            workers.append(start(entry, options, log))
        for number in range(-1, options.rounds):
            console.print("warming up" if number < 0 else f"round {number + 1} of {options.rounds}")
            # Each round starts with another contender, so that nobody always follows the same one.
            shift = max(number, 0) % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                worker.step(timed=number >= 0)
    finally:
        for worker in workers:
            worker.stop()
    return workers


def summary(workers: list[Worker], options: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {
        w.entry.name: {
            "what": w.entry.what,
            "seconds": statistics.median(w.seconds),
            "rounds": w.seconds,
            "cpu_seconds": statistics.median(w.cpu_seconds),
            "cpu_rounds": w.cpu_seconds,
            "losses": w.losses,
            "peak_bytes": w.peak_bytes,
        }
        for w in workers
    }
    bars = [
        {"numerator": top, "denominator": bottom, "of": each, "ratio": rows[top][each] / rows[bottom][each], "bar": bar}
        for top, bottom, of, bar in BARS
        if top in rows and bottom in rows
        # The ratio of CPU seconds says on a busy machine what that of seconds says on an idle one.
        for each in ((of, "cpu_seconds") if of == "seconds" else (of,))
    ]
    return {
        "task": asdict(Task()),
        "target": options.target,
        "threads": options.threads,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average_after": os.getloadavg(),
        "versions": {name: version(name) for name in ("mobizo", "torch", "executorch", "transformers", "peft")},
        "contenders": rows,
        "bars": bars,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def show(result: dict[str, Any], console: Console) -> None:
    rows: dict[str, dict[str, Any]] = result["contenders"]
    table = Table(
        title="One training step on SmolLM2-135M: 4 queries, batch 4, 64 tokens, one label, on the last token"
    )
    for column in ("contender", "what it computes"):
        table.add_column(column)
    for column in ("seconds (median)", "best", "CPU s", "against step", "peak MiB", "first loss"):
        table.add_column(column, justify="right")
    base = rows["step"]["seconds"] if "step" in rows else None
    for name, row in rows.items():
        against = f"{row['seconds'] / base:.2f} ×" if base else "-"
        peak = f"{row['peak_bytes'] / 2**20:.0f}"
        # The same model, batch and label: first losses that differ by more than a perturbation are different tasks.
        seconds, best = f"{row['seconds']:.2f}", f"{min(row['rounds']):.2f}"
        busy = f"{row['cpu_seconds']:.2f}"
        table.add_row(name, row["what"], seconds, best, busy, against, peak, f"{row['losses'][0]:.2f}")
    console.print(table)
    for bar in result["bars"]:
        verdict = "within" if bar["ratio"] <= bar["bar"] else "ABOVE"
        console.print(
            f"{bar['of']} of {bar['numerator']} / {bar['denominator']}: {bar['ratio']:.2f}, {verdict} {bar['bar']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds after one to warm up (default: 5)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="contenders to run (default: all)")
    parser.add_argument("--target", default="xnnpack", help="what the compiled contenders are lowered to")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"), help="results and compiled programs")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    workers = measure([entry for entry in ENTRIES if entry.name in options.only], options, console)
    result = summary(workers, options)
    path = options.out / "step_time.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result, console)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
