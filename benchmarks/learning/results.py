"""From runs to what is reported: quality under budget, cost to target, the table and the picture."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks.learning.contenders import CONTENDERS
from benchmarks.learning.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f4e8c", "#b0413e", "#3a7d44", "#8a5a9e", "#c27c0e", "#555555")


def by_contender(records: Sequence[dict[str, Any]], task: str) -> dict[str, list[dict[str, Any]]]:
    """The task's runs, in the order of `CONTENDERS`."""
    own = [record for record in records if record["task"] == task]
    found = {name: [record for record in own if record["contender"] == name] for name in CONTENDERS}
    return {name: rows for name, rows in found.items() if rows}


def cost_to(points: Sequence[dict[str, Any]], target: float, axis: str) -> float | None:
    """Where accuracy first reaches the target, on a straight line between evaluations; None if it never does."""
    if points[0]["accuracy"] >= target:
        return 0.0
    for before, after in itertools.pairwise(points):
        if after["accuracy"] >= target:
            share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[axis] + share * (after[axis] - before[axis])
    return None


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and contender. A cost is the median over seeds, and there only if all reached the target."""
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        target = TASKS[task].target
        for name, runs in by_contender(records, task).items():
            final = [run["points"][-1]["accuracy"] for run in runs]
            costs = {
                axis: [cost_to(run["points"], target, axis) for run in runs] for axis in ("cpu_seconds", "examples")
            }
            reached = sum(cost is not None for cost in costs["cpu_seconds"])
            rows.append(
                {
                    "task": task,
                    "contender": name,
                    "seeds": len(runs),
                    "quality_under_budget": [
                        {
                            "cpu_seconds": mark,
                            "mean": statistics.fmean(run["points"][place]["accuracy"] for run in runs),
                            "std": _deviation(run["points"][place]["accuracy"] for run in runs),
                        }
                        for place, mark in enumerate((0.0, *runs[0]["marks"]))
                    ],
                    "final_accuracy": statistics.fmean(final),
                    "final_std": _deviation(final),
                    "target": target,
                    "reached": reached,
                    "cost_to_target": {
                        axis: statistics.median(found) if len(found) == len(runs) else None
                        for axis, costs_of in costs.items()
                        for found in ([cost for cost in costs_of if cost is not None],)
                    },
                    "cpu_seconds_per_step": statistics.median(
                        run["points"][-1]["cpu_seconds"] / run["points"][-1]["steps"] for run in runs
                    ),
                    "peak_bytes": max(run["peak_bytes"] for run in runs),
                }
            )
    return rows


def _deviation(values: Iterable[float]) -> float:
    listed = list(values)
    return statistics.stdev(listed) if len(listed) > 1 else 0.0


def table(rows: Sequence[dict[str, Any]], task: str) -> Table:
    """One task: accuracy at each budget, cost to the target, cost of a step, peak memory."""
    own = [row for row in rows if row["task"] == task]
    start = own[0]["quality_under_budget"][0]["mean"]
    target = TASKS[task].target
    shown = Table(title=f"{TASKS[task].what}; accuracy {start:.3f} before")
    shown.add_column("contender")
    for point in own[0]["quality_under_budget"][1:]:
        shown.add_column(f"{point['cpu_seconds']:.0f} s", justify="right")
    for column in (f"CPU s to {target:.0%}", f"examples to {target:.0%}", "CPU s / step", "peak MiB"):
        shown.add_column(column, justify="right")
    for row in own:
        cells = [f"{p['mean']:.3f} ± {p['std']:.3f}" for p in row["quality_under_budget"][1:]]
        for axis in ("cpu_seconds", "examples"):
            cost = row["cost_to_target"][axis]
            cells.append(f"{row['reached']} of {row['seeds']} runs" if cost is None else f"{cost:.0f}")
        cells += [f"{row['cpu_seconds_per_step']:.2f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        shown.add_row(CONTENDERS[row["contender"]].what, *cells)
    return shown


def draw(records: Sequence[dict[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Accuracy over CPU seconds and over examples, a row per task: mean over seeds, and from worst to best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, and the same results give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "mobizo", "font.size": 9})
    figure, axes = plt.subplots(len(tasks), 2, figsize=(10, 3.4 * len(tasks)), layout="constrained", squeeze=False)
    colors = dict(zip(CONTENDERS, COLORS, strict=False))
    for row, task in zip(axes, tasks, strict=True):
        for axis, name, label in zip(
            row, ("cpu_seconds", "examples"), ("CPU seconds of training", "examples seen"), strict=True
        ):
            for contender, runs in by_contender(records, task).items():
                _curve(axis, runs, name, CONTENDERS[contender].what, colors[contender])
            axis.set(xlabel=label, ylabel="held-out accuracy", title=TASKS[task].what)
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[1].set_xscale("symlog", linthresh=100)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _curve(axis: Axes, runs: Sequence[dict[str, Any]], name: str, label: str, color: str) -> None:
    places = range(min(len(run["points"]) for run in runs))
    across = [[run["points"][place] for run in runs] for place in places]
    x = [statistics.fmean(point[name] for point in points) for points in across]
    y = [[point["accuracy"] for point in points] for points in across]
    axis.plot(x, [statistics.fmean(each) for each in y], marker="o", markersize=3, color=color, label=label)
    axis.fill_between(x, [min(each) for each in y], [max(each) for each in y], color=color, alpha=0.15, linewidth=0)
