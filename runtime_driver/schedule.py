"""Learning-rate schedules: pure functions of the step number, so that a resumed run sees the same values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from runtime_driver.format.errors import HyperparameterError
from runtime_driver.format.numbers import as_float32

#: A number for every step, or a function from the step number (0 first) to the number.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class LinearDecay:
    """From ``value`` at step 0 down to ``final`` at step ``steps - 1``, and ``final`` after that."""

    value: float
    steps: int
    final: float = 0.0

    def __call__(self, step: int) -> float:
        if self.steps <= 1 or step >= self.steps:
            return self.value if self.steps <= 1 and step == 0 else self.final
        return self.value + (self.final - self.value) * step / (self.steps - 1)


def as_schedule(value: float | Schedule) -> Schedule:
    """A number becomes :class:`Constant`; a callable is returned as it is."""
    return value if callable(value) else Constant(float(value))


def describe(schedule: Schedule) -> str:
    """One line for the journal's header; for people, never compared (each step's value is)."""
    return repr(schedule) if isinstance(schedule, (Constant, LinearDecay)) else f"callable {type(schedule).__name__}"


def checked(name: str, value: float, *, positive: bool) -> float:
    """``value`` rounded to float32.

    Raises:
        HyperparameterError: not finite in float32, negative, or zero where ``positive``.
    """
    rounded = as_float32(float(value))
    if not math.isfinite(rounded) or rounded < 0 or (positive and rounded == 0):
        raise HyperparameterError(name, f"a finite float32 {'> 0' if positive else '>= 0'}", value)
    return rounded
