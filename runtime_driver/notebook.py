"""A progress bar for notebooks."""

from __future__ import annotations

import sys
import time
from html import escape
from typing import TYPE_CHECKING, Any

from runtime_driver.run_status import RunStatus, describe_evaluation

if TYPE_CHECKING:
    from runtime_driver.callbacks import Callback
    from runtime_driver.results import EvaluationRecord, FitResult, FitStart, StepRecord

#: Seconds between two states of the bar: each is a message to the browser.
_PAUSE = 0.1


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, whose outputs a browser shows."""
    # It cannot be if nobody has imported IPython.
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def progress_bars(asked: bool) -> list[Callback]:
    """The bar of a run: in a notebook below the cell; elsewhere on stderr, if asked for or if that is a terminal."""
    if in_notebook():
        return [NotebookProgress()]
    if asked or sys.stderr.isatty():
        from runtime_driver.progress import ProgressBar

        return [ProgressBar()]
    return []


class NotebookProgress(RunStatus):
    """Shows a run's progress below a notebook's cell. ``fit`` adds one by itself in a notebook.

    The browser draws the bar: rich and tqdm need ipywidgets for that, in the kernel and in the browser.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None
        self._shown = -1.0
        self._lines: list[str] = []

    def on_start(self, start: FitStart) -> None:
        """Put the bar below the cell."""
        from IPython.display import HTML, display

        super().on_start(start)
        self._started = time.monotonic()
        self._handle = display(HTML(self._html(start.first_step, "")), display_id=True)

    def on_step(self, record: StepRecord) -> None:
        """Move on by one step."""
        super().on_step(record)
        done, now = record.step + 1, time.monotonic()
        if now - self._shown >= _PAUSE or done == self.steps:
            self._shown = now
            left = (now - self._started) / max(done - self.first_step, 1) * (self.steps - done)
            self._show(done, f"{self.status}  {_clock(left)} left")

    def on_evaluate(self, record: EvaluationRecord) -> None:
        """Write the evaluation below the bar."""
        self._lines.append(f"step {record.step}: {describe_evaluation(record)}")
        self._show(record.step, self.status)

    def on_end(self, result: FitResult | None) -> None:
        """Leave the bar where the run ended."""
        if result is not None:
            self._show(result.steps, self.status + ("  interrupted" if result.interrupted else ""))

    def _show(self, done: int, status: str) -> None:
        from IPython.display import HTML

        if self._handle is not None:
            self._handle.update(HTML(self._html(done, status)))

    def _html(self, done: int, status: str) -> str:
        evaluations = "".join(f"<div>{escape(line)}</div>" for line in self._lines)
        bar = f'<progress value="{done}" max="{self.steps}"></progress>'
        return f"<div>train {bar} {done}/{self.steps}  {escape(status)}</div>{evaluations}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
