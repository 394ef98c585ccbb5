"""Adds up what the ``loss`` method returns for batches, and puts the loss of all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runtime_driver.errors import BatchError

if TYPE_CHECKING:
    from torch import Tensor

    from runtime_driver.format import EvaluationSpec


class LossTotals:
    """Sums over the rows of any number of batches, in double precision.

    :attr:`value` is what the loss function would give on all rows in one batch. An input that counts the items of its
    batch (Hugging Face's ``num_items_in_batch``) is added up; any other number that holds no batch must stay the same.
    """

    def __init__(self, spec: EvaluationSpec) -> None:
        self._spec = spec
        self._sums = [0.0] * len(spec.terms)
        self._weights = [0.0] * len(spec.terms)
        self._scalars: list[float | None] = [None] * len(spec.scalars)
        self.rows = 0
        self.batches = 0

    def add(self, outputs: Mapping[str, Tensor], rows: int) -> None:
        """Add the first ``rows`` rows of one run of ``loss``; ``outputs`` are its outputs by name.

        Raises:
            BatchError: a number that holds no batch is another than in the batches before.
        """
        for i, term in enumerate(self._spec.terms):
            self._sums[i] += float(outputs[term.sum][:rows].double().sum())
            weight = outputs[term.weight][:rows].double().sum() if term.weight is not None else term.per_row * rows
            self._weights[i] += float(weight)
        for i, scalar in enumerate(self._spec.scalars):
            value, before = float(outputs[scalar.name]), self._scalars[i]
            if before is None:
                self._scalars[i] = value
            elif scalar.adds_up:
                self._scalars[i] = before + value
            elif not math.isclose(value, before, rel_tol=1e-6, abs_tol=1e-12):
                raise BatchError(
                    "(all)",
                    f"a part of the loss that holds no batch is {value:.6g} here, and was {before:.6g} before",
                    "Give inputs without a batch dimension the same values in all batches, or evaluate them apart.",
                )
        self.rows += rows
        self.batches += 1

    @property
    def value(self) -> float:
        """The loss of all rows added so far; NaN where it divides by nothing."""
        import torch

        known: dict[str, float] = {"rows": float(self.rows)}
        for i, term in enumerate(self._spec.terms):
            total, weight = self._sums[i], self._weights[i]
            known[f"t{i}"] = total if not term.mean else total / weight if weight else math.nan
        known |= {f"s{i}": math.nan if value is None else value for i, value in enumerate(self._scalars)}

        def read(operand: float | str) -> Tensor:
            return torch.tensor(known[operand] if isinstance(operand, str) else operand, dtype=torch.float64)

        for i, step in enumerate(self._spec.steps):
            args = [read(a) for a in step.args]
            if step.op == "where":
                args[0] = args[0] != 0
            known[f"n{i}"] = float(getattr(torch, step.op)(*args))
        return float(read(self._spec.result))
