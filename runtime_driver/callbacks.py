"""What a run tells its observers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime_driver.results import EvaluationRecord, FitResult, FitStart, StepRecord


class Callback:
    """Override what you need. A callback runs after its step is in the journal; what it raises ends the run."""

    def on_start(self, start: FitStart) -> None:
        """Before the first step, after a resume."""

    def on_step(self, record: StepRecord) -> None:
        """After every step."""

    def on_evaluate(self, record: EvaluationRecord) -> None:
        """After every evaluation inside the run."""

    def on_end(self, result: FitResult | None) -> None:
        """Last of all; ``None`` when the run ends by an error."""
