"""One row of the coverage table: a model, its inputs, the options of `transform`, and what is expected of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import mobizo_passes as mz
from mobizo_passes import pipelines
from mobizo_passes.autograd import LOSS_TOLERANCE, Autograd
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.program import run_passes
from mobizo_passes.transform import only
from tests.models import seeded

QUERIES, SEED = 2, 5

# Options that rows share; every row that has one says so in the table.
BOTH: dict[str, Any] = {"trainable": "lora_A+lora_B"}
SIGNS: dict[str, Any] = {"noise": "rademacher"}
ONE_SIDED: dict[str, Any] = {"estimator": mz.OneSided(queries=QUERIES)}


@dataclass(frozen=True)
class Refusal:
    """An error type and a regular expression that its message matches."""

    error: type[mz.MobizoError]
    reason: str


@dataclass(frozen=True, eq=False)
class Row:
    """`build` gives a fresh model with non-zero LoRA-B in eval mode; `inputs` its example inputs, batch of two or more.

    `left_out`: why candidates are rightly not taken; no other reason is accepted. `refused`: refused on purpose.
    """

    architecture: str
    variant: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: str = ""
    refused: Refusal | None = None

    def __str__(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.architecture} {self.variant}".lower()).strip("-")

    def transform(self, model: nn.Module, inputs: Any, **other: Any) -> mz.TrainingProgram:
        """The row's program, by default with two-sided differences of two queries."""
        return mz.transform(model, inputs, **{"estimator": mz.TwoSided(queries=QUERIES), **self.options, **other})

    @property
    def shown_options(self) -> str:
        """The options that matter to a reader: not the loss, which is part of the variant."""
        # Which parameters are chosen by a predicate or a list, the variant says.
        words = [v for k, v in self.options.items() if k in ("noise", "trainable") and isinstance(v, str)]
        words += ["one-sided"] if "estimator" in self.options else []
        words += [f"batch_dim={self.options['batch_dim']}"] if "batch_dim" in self.options else []
        return ", ".join(words)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: its program, the number of sites or tensors, the spread of the losses, or the error."""

    program: mz.TrainingProgram | None = None
    sites: int = 0
    spread: float = 0.0
    tolerance: float = 0.0
    error: mz.MobizoError | None = None
    derivatives: Mapping[str, mz.MobizoError | None] = field(default_factory=dict)

    def text(self) -> str:
        """The cell of the result: `agrees`, or why not, on one line and without the advice."""
        return _told(self.error)

    def derivative_text(self, name: str) -> str:
        """The cell of the gradient, "exact", or of its projections, "forward"; nothing where the row is refused."""
        return _told(self.derivatives[name]) if self.error is None else "–"


def _told(error: mz.MobizoError | None) -> str:
    if error is None:
        return "agrees"
    if isinstance(error, mz.VerificationFailed):
        return f"WRONG: {error}"
    return f"refused: {type(error).__name__}: {_reason(str(error))}"


def _reason(message: str) -> str:
    """The first line of a message and where it points to, without the library's line number, which moves."""
    lines = message.splitlines()
    place = next((line.strip() for line in lines[1:] if line.strip().startswith("at %")), "")
    # NoLoRASites explains at length what a site is; the first clause is the reason.
    text = f"{lines[0].partition(': no two matrices')[0]} {place}".strip()
    misses = lines[lines.index("nearest misses:") + 1 :] if "nearest misses:" in lines else []
    if misses:
        text = f"found no LoRA site: {misses[0].partition(': ')[2]}"
    return re.sub(r", line \d+, in \w+", "", text).replace("|", "\\|")


@functools.cache
def outcome(row: Row) -> Outcome:
    """Transform and verify a row, once per process."""
    model, inputs = row.build(), row.inputs()
    try:
        program = row.transform(model, inputs)
        _check_all_taken(row, model, program)
        result = mz.verify(program, model, inputs, seed=SEED)
    except mz.MobizoError as error:
        return Outcome(error=error.with_traceback(None))
    losses = result.losses
    tolerance = LOSS_TOLERANCE * max(1.0, float(losses.abs().max()))
    spread = float(losses.max() - losses.min())
    sites = len(program.sites) or len(program.initial_adapter())
    return Outcome(program, sites, spread, tolerance, derivatives=_derivatives(row, program, inputs))


def _derivatives(row: Row, program: mz.TrainingProgram, inputs: Any) -> dict[str, mz.MobizoError | None]:
    """What is wrong with the derivatives of a row, from a capture of its own where the model cuts gradients off."""
    model, adapter = row.build(), program.initial_adapter()
    true = Autograd.of(model, inputs, adapter, row.options.get("loss"))
    evaluated = only(program.captured, "loss")
    run_passes(evaluated, pipelines.evaluate(program.labels["max_labels"]))
    z = mz.reference.draw(adapter, SEED, QUERIES, program.noise)
    given = {**adapter, **program.example_batch(), "seed": torch.tensor([SEED]), "lr": torch.zeros(1)}

    def exact() -> None:
        found = run_passes(evaluated.clone(), pipelines.gradients(mz.Exact())).run(given)
        true.check_gradients(found["loss"], found)

    def forward() -> None:
        batch = batch_of(evaluated, row.options.get("batch_dim", 0))
        passes = pipelines.step(mz.ForwardGradient(QUERIES), program.noise, batch)
        found = run_passes(evaluated.clone(), passes).run(given)
        true.check_directional(found["loss"], found["projected_gradients"], z)

    def captured_anew(estimator: mz.Estimator) -> Callable[[], object]:
        return lambda: mz.verify(row.transform(model, inputs, estimator=estimator), model, inputs)

    checks: dict[str, Callable[[], object]] = {"exact": exact, "forward": forward}
    if "DoRA" in row.variant or "no_grad" in row.variant:
        checks = {"exact": captured_anew(mz.Exact()), "forward": captured_anew(mz.ForwardGradient(QUERIES))}
    return {name: _error(check) for name, check in checks.items()}


def _error(check: Callable[[], object]) -> mz.MobizoError | None:
    try:
        check()
    except mz.MobizoError as error:
        return error.with_traceback(None)
    return None


def _check_all_taken(row: Row, model: nn.Module, program: mz.TrainingProgram) -> None:
    """A row that trains less than it asks for is not covered: raise for a candidate that was passed over."""
    if program.trainable == "parameters":
        return
    reasons = {candidate.name: candidate.reason for candidate in program.sites.rejected}
    taken = {factor for site in program.sites for factor in (site.lora_A, site.lora_B)}
    for name, _ in model.named_parameters():
        if re.search(r"(?<![a-z])lora_(embedding_)?[AB]\b(?!.*bias)", name) and name not in taken and not row.left_out:
            reasons.setdefault(name, "not among the sites, and not among the rejected")
    for name, reason in reasons.items():
        if not row.left_out or not re.search(row.left_out, reason):
            raise mz.NoLoRASites(f"nearest misses:\n  {name}: {reason}")


def filled(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Fixed random values in every parameter, LoRA-B included; eval mode."""
    torch.manual_seed(0)
    return seeded(model, scale=scale)
