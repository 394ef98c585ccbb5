"""How the outputs of the ``loss`` method combine into the loss of a whole data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Element-wise operations on numbers, by torch's names; a comparison gives 1 or 0.
NumberOp = Literal[
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "where", "neg", "abs",
    "sqrt", "rsqrt", "square", "exp", "expm1", "log", "log1p", "reciprocal", "sigmoid", "tanh", "relu",
]  # fmt: skip

#: A number, or the name of one: ``t0`` a term, ``s0`` a scalar, ``n0`` a step before, ``rows`` the number of examples.
Operand = float | Annotated[str, Field(pattern=r"^(rows|[tsn]\d+)$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class LossTerm(_Record):
    """One reduction over the batch. ``sum`` and ``weight`` name outputs of ``loss`` with one value per example.

    The term is the sum over all examples, divided if it is a ``mean`` by the sum of the weights (without an output of
    weights, every example weighs ``per_row``).
    """

    sum: Annotated[str, Field(min_length=1)]
    mean: bool
    weight: Annotated[str, Field(min_length=1)] | None = None
    per_row: Annotated[float, Field(gt=0)] = 1.0


class LossScalar(_Record):
    """An output of ``loss`` that holds no batch: the same for all batches, or a count that ``adds_up`` over them."""

    name: Annotated[str, Field(min_length=1)]
    adds_up: bool = False


class NumberStep(_Record):
    """One operation; its result is ``n<i>``, i its place in the list."""

    op: NumberOp
    args: tuple[Operand, ...]


class EvaluationSpec(_Record):
    """The loss as an expression over sums. ``refusal``: why it has none, so that batches can't be combined."""

    terms: tuple[LossTerm, ...] = ()
    scalars: tuple[LossScalar, ...] = ()
    steps: tuple[NumberStep, ...] = ()
    result: Operand = "t0"
    refusal: str = ""


def faults(spec: EvaluationSpec, outputs: Sequence[str]) -> str:
    """What is wrong with a specification whose method has these outputs; "" if nothing."""
    if spec.refusal:
        return ""
    wanted = [n for t in spec.terms for n in (t.sum, t.weight) if n is not None] + [s.name for s in spec.scalars]
    missing = [n for n in wanted if n not in outputs]
    if missing:
        return f"names {missing}, which `loss` does not return"
    known = {"rows", *(f"t{i}" for i in range(len(spec.terms))), *(f"s{i}" for i in range(len(spec.scalars)))}
    for i, step in enumerate(spec.steps):
        unknown = [a for a in step.args if isinstance(a, str) and a not in known]
        if unknown:
            return f"step {i} reads {unknown}, which is not known there"
        arity = 3 if step.op == "where" else 2 if step.op in _BINARY else 1
        if len(step.args) != arity:
            return f"step {i}, `{step.op}`, takes {arity} arguments, found {len(step.args)}"
        known.add(f"n{i}")
    if isinstance(spec.result, str) and spec.result not in known:
        return f"the result {spec.result!r} is not known"
    return ""


_BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")
