"""How the losses of parts of a data set combine into the loss of the whole: a small expression over sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

# A name of a value ("t0" a term, "s0" a scalar, "n0" an earlier step, "rows" the number of examples), or a number.
Arg = float | str


@dataclass(frozen=True)
class Term:
    """A reduction over the batch: the sum over all rows, divided in a mean by the rows' weights.

    A mean without an output of weights weighs every row by `per_row`.
    """

    mean: bool
    weighted: bool
    per_row: float = 1.0


@dataclass(frozen=True)
class Step:
    """One element-wise operation on numbers, by torch's name of it."""

    op: str
    args: tuple[Arg, ...]


@dataclass(frozen=True)
class Combination:
    """What the loss is made of.

    `scalars` tells of each value that holds no batch whether it is the same for all batches ("same"), or counts what is
    in a batch, so that counts add up ("count"). `refusal`: why losses of parts can't be combined; "" if they can.
    """

    terms: tuple[Term, ...] = ()
    scalars: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    result: Arg = "t0"
    refusal: str = ""
    # Terms whose place of the batch was guessed from a shape: good only if a run on more rows confirms it.
    guessed: bool = field(default=False, compare=False)

    def part(self, term: int, sums: Sequence[float], weights: Sequence[float], rows: int) -> float:
        """Return one term's value; the weights of a term without an output of weights may be anything."""
        spec = self.terms[term]
        if not spec.mean:
            return sums[term]
        weight = weights[term] if spec.weighted else spec.per_row * rows
        return sums[term] / weight if weight else math.nan

    def value(self, sums: Sequence[float], weights: Sequence[float], scalars: Sequence[float], rows: int) -> float:
        """Return the loss of `rows` rows from the sums and weights over them of every term, and the scalars."""
        known = {f"t{i}": self.part(i, sums, weights, rows) for i in range(len(self.terms))}
        known |= {f"s{i}": value for i, value in enumerate(scalars)} | {"rows": float(rows)}

        def read(arg: Arg) -> torch.Tensor:
            return torch.tensor(known[arg] if isinstance(arg, str) else arg, dtype=torch.float64)

        for i, step in enumerate(self.steps):
            args = [read(a) for a in step.args]
            args = [args[0] != 0, *args[1:]] if step.op == "where" else args
            known[f"n{i}"] = float(getattr(torch, step.op)(*args))
        return float(read(self.result))

    def manifest(self) -> dict[str, Any]:
        """Return the manifest's field, as JSON values."""
        terms = [
            {
                "sum": f"loss_sum_{i}",
                "mean": t.mean,
                "weight": f"loss_weight_{i}" if t.weighted else None,
                "per_row": t.per_row,
            }
            for i, t in enumerate(self.terms)
        ]
        scalars = [{"name": f"loss_scalar_{i}", "adds_up": kind == "count"} for i, kind in enumerate(self.scalars)]
        steps = [{"op": s.op, "args": list(s.args)} for s in self.steps]
        return {"terms": terms, "scalars": scalars, "steps": steps, "result": self.result, "refusal": self.refusal}


def ambiguous(combination: Combination, size: int) -> bool:
    """Whether a number that scales the loss may come from the size of the batch."""
    return bool(_numbers(combination, size))


def readings(combination: Combination, size: int) -> list[Combination]:
    """Return what a captured loss may mean: a number in it may be a number, or come from the size of the batch.

    ``loss.sum() / len(x)`` is captured as a division by that batch's size. The first reading takes numbers as they are.
    """
    places = _numbers(combination, size)
    sums = [f"t{i}" for i, term in enumerate(combination.terms) if not term.mean]
    choices = [c for c in itertools.product((False, True), repeat=len(places) + len(sums)) if sum(c) <= 2]
    found = []
    for chosen in sorted(choices, key=sum):
        numbers = [place for place, taken in zip(places, chosen, strict=False) if taken]
        scaled = [name for name, taken in zip(sums, chosen[len(places) :], strict=True) if taken]
        found.append(_read(combination, size, numbers, scaled))
    return found


def _numbers(combination: Combination, size: int) -> list[tuple[int, int]]:
    return [
        (at, i)
        for at, step in enumerate(combination.steps)
        for i, arg in enumerate(step.args)
        if step.op in ("mul", "div") and isinstance(arg, float) and _share(arg, size) is not None
    ]


def _share(number: float, size: int) -> tuple[float, bool] | None:
    """Read a number as so many per row (True), or as so many divided by the rows (False)."""
    if number != 0 and (number / size).is_integer():
        return number / size, True
    inverse = 1 / number / size if number else 0.5
    return (1 / round(inverse), False) if abs(inverse) >= 1 and math.isclose(inverse, round(inverse)) else None


def _read(
    combination: Combination, size: int, numbers: Sequence[tuple[int, int]], scaled: Sequence[str]
) -> Combination:
    steps: list[Step] = []
    names: dict[str, Arg] = {}

    def add(op: str, *args: Arg) -> str:
        steps.append(Step(op, args))
        return f"n{len(steps) - 1}"

    for name in scaled:
        names[name] = add("div", add("mul", name, float(size)), "rows")
    for at, step in enumerate(combination.steps):
        args: list[Arg] = []
        for i, arg in enumerate(step.args):
            if (at, i) in numbers and isinstance(arg, float):
                share, times = _share(arg, size) or (arg, True)
                args.append(add("mul", "rows", share) if times else add("div", share, "rows"))
            else:
                args.append(names.get(arg, arg) if isinstance(arg, str) else arg)
        names[f"n{at}"] = add(step.op, *args)
    result = combination.result
    return replace(
        combination, steps=tuple(steps), result=names.get(result, result) if isinstance(result, str) else result
    )
