"""How far a run is, as a line of text: loss, examples per second, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime_driver.callbacks import Callback
from runtime_driver.memory import rss_bytes

if TYPE_CHECKING:
    from runtime_driver.results import EvaluationRecord, FitStart, StepRecord

#: Weight of the newest loss and step time in the running means.
_SMOOTHING = 0.1


class RunStatus(Callback):
    """Running means of a run. Attributes: first_step, steps, and status, a line of text."""

    def __init__(self) -> None:
        self.first_step = self.steps = 0
        self.status = ""
        self._batch_size = 1
        self._loss: float | None = None
        self._seconds: float | None = None

    def on_start(self, start: FitStart) -> None:
        """Note where the run begins and ends."""
        self.first_step, self.steps, self._batch_size = start.first_step, start.steps, start.batch_size

    def on_step(self, record: StepRecord) -> None:
        """Take the step into the means."""
        self._loss = _smooth(self._loss, record.loss)
        self._seconds = _smooth(self._seconds, record.seconds)
        rate = self._batch_size / self._seconds if self._seconds else 0.0
        self.status = f"loss {self._loss:.4f}  {rate:.1f} examples/s  {rss_bytes() / 2**20:.0f} MiB"


def describe_evaluation(record: EvaluationRecord) -> str:
    """``evaluation loss 0.512, accuracy 75.0 % (60 of 80)``, with what was measured."""
    return f"evaluation {', '.join(map(' '.join, record.evaluation.measured))}"


def _smooth(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)
