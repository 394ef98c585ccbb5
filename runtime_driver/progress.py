"""A progress bar on stderr: loss, examples per second, time left, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from runtime_driver.run_status import RunStatus, describe_evaluation

if TYPE_CHECKING:
    from runtime_driver.results import EvaluationRecord, FitResult, FitStart, StepRecord


class ProgressBar(RunStatus):
    """Shows a run's progress with rich. ``fit`` adds one by itself when stderr is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def on_start(self, start: FitStart) -> None:
        """Open the bar at the first step to run."""
        super().on_start(start)
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
        super().on_step(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step + 1, status=self.status)

    def on_evaluate(self, record: EvaluationRecord) -> None:
        """Print the evaluation above the bar."""
        if self._progress is not None:
            self._progress.console.print(f"step {record.step}: {describe_evaluation(record)}", highlight=False)

    def on_end(self, result: FitResult | None) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
