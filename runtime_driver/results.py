"""What the session's methods return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime_driver.markup import curve, facts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepOutput:
    """One training step.

    Attributes:
        loss: the step's loss, as the program reports it (float32).
        losses: the loss of each perturbed group, P values; empty when the program does not return them.
        projected_gradients: q float32 values.
        adapter: the new trainable tensors by FQN.
        optimizer: the optimizer's new state by name; empty for one without.
    """

    loss: float
    losses: tuple[float, ...]
    projected_gradients: tuple[float, ...]
    adapter: dict[str, Tensor] = field(repr=False)
    optimizer: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def _repr_html_(self) -> str:
        losses, gradients = (", ".join(map(_number, each)) for each in (self.losses, self.projected_gradients))
        return facts(
            "one step",
            [("loss", _number(self.loss)), ("losses", losses or "none"), ("projected gradients", gradients or "none")],
        )


@dataclass(frozen=True)
class Evaluation:
    """A pass over evaluation batches.

    Attributes:
        loss: what the model's own loss function gives on all examples in one batch; None when not asked for.
        accuracy: share of correct examples; None when not asked for.
        correct: number of correct examples; None when not asked for.
        examples: rows read.
        batches: batches run.
    """

    loss: float | None
    accuracy: float | None
    correct: int | None
    examples: int
    batches: int

    def _repr_html_(self) -> str:
        return facts("evaluation", [*self.measured, ("examples", self.examples), ("batches", self.batches)])

    @property
    def measured(self) -> list[tuple[str, str]]:
        """What was asked for, as names and values in words."""
        shown = [] if self.loss is None else [("loss", f"{self.loss:.4f}")]
        if self.accuracy is not None:
            shown.append(("accuracy", f"{self.accuracy:.1%} ({self.correct} of {self.examples})"))
        return shown


@dataclass(frozen=True)
class FitStart:
    """Given to callbacks before the first step: ``first_step`` > 0 when a journal was resumed."""

    first_step: int
    steps: int
    batch_size: int


@dataclass(frozen=True)
class StepRecord:
    """Given to callbacks after each step: ``seconds`` is the wall time of this step's execution."""

    step: int
    seed: int
    lr: float
    eps: float
    loss: float
    projected_gradients: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class EvaluationRecord:
    """Given to callbacks after an evaluation: ``step`` is the number of completed steps."""

    step: int
    evaluation: Evaluation


@dataclass(frozen=True)
class FitResult:
    """A finished or interrupted run.

    Attributes:
        steps: completed steps of the run, resumed ones included.
        first_step: steps that came from the journal and were not run again.
        interrupted: True when Ctrl-C ended the run before its last step.
        losses: float32 loss of every step of the run that the journal or this call saw, in order.
        evaluations: evaluations made by this call.
        seconds: wall time of this call.
        peak_memory_bytes: largest resident set of the process so far.
    """

    steps: int
    first_step: int
    interrupted: bool
    losses: tuple[float, ...]
    evaluations: tuple[EvaluationRecord, ...]
    seconds: float
    peak_memory_bytes: int

    def _repr_html_(self) -> str:
        known = self.losses
        shown = facts(
            "training" + (", interrupted" if self.interrupted else ""),
            [
                ("steps", f"{self.steps}" + (f", from {self.first_step} of the journal" if self.first_step else "")),
                *([("loss", f"{_number(known[0])} → {_number(known[-1])}")] if known else []),
                *(
                    (f"step {each.step}", ", ".join(map(" ".join, each.evaluation.measured)))
                    for each in self.evaluations
                ),
                ("seconds", f"{self.seconds:.1f}"),
                ("largest memory", f"{self.peak_memory_bytes / 2**20:.0f} MiB"),
            ],
        )
        return shown + curve(known, "loss of each step")


def _number(value: float) -> str:
    return f"{value:.6g}"
