"""Accuracy over CPU time: the compiled programs beside what one would do in eager PyTorch.

    python benchmarks/time_to_accuracy.py [--budget 96] [--seeds 3] [--tasks NAME ...] [--only NAME ...]

All learn the same tasks with the same LoRA on the same sentences in the same order. What is equal is the CPU time
that the training process spends in steps; the first step of a compiled program includes the packing of its weights,
compiling is not counted. Reported are quality under budget (accuracy on held-out sentences at equal CPU time), cost to
target (CPU seconds and examples until the target accuracy) and peak memory of the training process. Each run has one
thread; CPU time counts all threads.

Finished runs are kept in `time_to_accuracy.json`: the same command again does what is left, and `--report` shows what
is there. `--search` compares learning rates instead, see `benchmarks/learning/contenders.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.learning.contenders import CONTENDERS
from benchmarks.learning.results import draw, summary, table
from benchmarks.learning.runs import Run, do_all
from benchmarks.learning.tasks import BATCH, DEVELOPMENT, HELD_OUT, TASKS
from benchmarks.step_time import processor

SEARCH_SEED, SEARCH_BUDGET, BUDGET = 1000, 30.0, 96.0
# The first evaluation is at this share of the budget, the others at equal ratios up to the whole.
FIRST = 1 / 16


def marks(budget: float, count: int) -> tuple[float, ...]:
    """CPU seconds at which to evaluate, the last one the budget."""
    if count == 1:
        return (budget,)
    return tuple(round(budget * FIRST ** (1 - place / (count - 1)), 2) for place in range(count))


def planned(options: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that what is there after an interruption says something about everyone."""
    search: bool = options.search
    return [
        Run(
            task,
            name,
            seed,
            rate,
            marks(options.budget, options.evaluations),
            "development" if search else "held_out",
            options.eval_size,
            options.threads,
            {**CONTENDERS[name].settings(), "batch": BATCH},
        )
        for seed in ([SEARCH_SEED] if search else range(options.seeds))
        for task in options.tasks
        for name in options.only
        for rate in (CONTENDERS[name].learning_rates if search else (CONTENDERS[name].learning_rate,))
    ]


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def save(
    path: Path, others: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Replace the file as a whole: an interruption leaves the old one or the new one."""
    versions = {name: version(name) for name in ("mobizo", "torch", "executorch", "transformers", "peft")}
    result = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions,
        "jobs": options.jobs,
        "summary": [] if options.search else summary(records),
        "runs": [*others, *records],
    }
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def search_table(records: Sequence[dict[str, Any]]) -> Table:
    """Accuracy of each learning rate at the end of its budget; what is chosen is in `contenders.py`."""
    shown = Table(title=f"Accuracy on development sentences, seed {SEARCH_SEED}")
    for column in ("task", "contender", "learning rate", "CPU s", "accuracy"):
        shown.add_column(column)
    for record in sorted(records, key=lambda r: (r["task"], r["contender"], r["learning_rate"])):
        last = record["points"][-1]
        cells = (f"{record['learning_rate']:g}", f"{last['cpu_seconds']:.0f}", f"{last['accuracy']:.3f}")
        shown.add_row(record["task"], record["contender"], *cells)
    return shown


def do(options: argparse.Namespace, console: Console) -> None:
    path: Path = options.out / ("learning_rates.json" if options.search else "time_to_accuracy.json")
    runs = planned(options)
    keys = [run.key() for run in runs]
    # Runs with other settings stay in the file; they are no part of this comparison.
    kept = load(path)
    done = [record for record in kept if any(key.items() <= record.items() for key in keys)]
    others = [record for record in kept if record not in done]
    left = [run for run, key in zip(runs, keys, strict=True) if not any(key.items() <= r.items() for r in done)]
    if options.report:
        report(done, options, console)
        return
    console.print(f"{len(runs)} runs, {len(done)} of them done; {len(left)} to do, {options.jobs} side by side")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} CPU s"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bars = {run: progress.add_task(run.title, total=options.budget, visible=False) for run in left}

        def tell(run: Run, spent: float) -> None:
            progress.update(bars[run], completed=spent, visible=True)

        for record in do_all(left, options.out, options.jobs, options.threads, tell):
            done.append(record)
            save(path, others, done, options)
            run = next(run for run in left if run.key().items() <= record.items())
            progress.update(bars[run], visible=False)
            accuracies = " ".join(f"{point['accuracy']:.3f}" for point in record["points"])
            console.print(f"{run.title}: {accuracies}")
    save(path, others, done, options)
    report(done, options, console)
    console.print(f"written: {path}")


def report(done: Sequence[dict[str, Any]], options: argparse.Namespace, console: Console) -> None:
    """Tables and picture of the runs that are there."""
    if options.search:
        console.print(search_table(done))
        return
    rows = summary(done)
    tasks = [task for task in options.tasks if any(row["task"] == task for row in rows)]
    for task in tasks:
        console.print(table(rows, task))
    if tasks:
        draw(done, tasks, options.out / "time_to_accuracy.svg")
        console.print(f"picture: {options.out / 'time_to_accuracy.svg'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, help=f"CPU seconds of a run (default: {BUDGET:g})")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contender and task (default: 3)")
    parser.add_argument("--evaluations", type=int, default=5, help="evaluations within the budget (default: 5)")
    parser.add_argument("--eval-size", type=int, default=400, help="sentences to evaluate on (default: 400)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side (default: a core each)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of a run (default: 1)")
    parser.add_argument("--report", action="store_true", help="show the runs that are there, and do none")
    parser.add_argument("--search", action="store_true", help="compare learning rates instead")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"), help="results and compiled programs")
    options = parser.parse_args()
    if options.budget is None:
        options.budget = SEARCH_BUDGET if options.search else BUDGET
    largest = DEVELOPMENT if options.search else HELD_OUT
    if min(options.seeds, options.evaluations, options.jobs, options.threads) < 1 or options.budget <= 0:
        parser.error("--seeds, --evaluations, --jobs and --threads must be at least 1, --budget above 0")
    if not 1 <= options.eval_size <= largest:
        parser.error(f"--eval-size must be from 1 to {largest}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    do(options, Console() if sys.stdout.isatty() else Console(width=160))


if __name__ == "__main__":
    main()
