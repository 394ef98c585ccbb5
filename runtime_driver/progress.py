"""A progress bar on stderr: loss, examples per second, time left, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from runtime_driver.callbacks import Callback
from runtime_driver.memory import rss_bytes

if TYPE_CHECKING:
    from runtime_driver.results import EvaluationRecord, FitResult, FitStart, StepRecord

#: Weight of the newest loss and step time in the running means that the bar shows.
_SMOOTHING = 0.1


class ProgressBar(Callback):
    """Shows a run's progress with rich. ``fit`` adds one by itself when stderr is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._batch_size = 1
        self._loss: float | None = None
        self._seconds: float | None = None

    def on_start(self, start: FitStart) -> None:
        """Open the bar at the first step to run."""
        self._batch_size = start.batch_size
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=start.steps, completed=start.first_step, status="")
        self._progress.start()

    def on_step(self, record: StepRecord) -> None:
        """Move on by one step."""
        if self._progress is None:
            return
        self._loss = _smooth(self._loss, record.loss)
        self._seconds = _smooth(self._seconds, record.seconds)
        rate = self._batch_size / self._seconds if self._seconds else 0.0
        status = f"loss {self._loss:.4f}  {rate:.1f} examples/s  {rss_bytes() / 2**20:.0f} MiB"
        self._progress.update(self._task, completed=record.step + 1, status=status)

    def on_evaluate(self, record: EvaluationRecord) -> None:
        """Print the evaluation above the bar."""
        if self._progress is not None:
            self._progress.console.print(f"step {record.step}: {describe_evaluation(record)}", highlight=False)

    def on_end(self, result: FitResult | None) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def describe_evaluation(record: EvaluationRecord) -> str:
    """``evaluation loss 0.512, accuracy 75.0 % (60 of 80)``, with what was measured."""
    evaluation = record.evaluation
    parts: list[str] = []
    if evaluation.loss is not None:
        parts.append(f"loss {evaluation.loss:.4f}")
    if evaluation.accuracy is not None:
        parts.append(f"accuracy {evaluation.accuracy:.1%} ({evaluation.correct} of {evaluation.examples})")
    return f"evaluation {', '.join(parts)}"


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
