"""Which training step to compile: what each estimator takes, and the first that fits."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobizo_cli.errors import ModelError, OptionError, note
from mobizo_cli.task import parse_layers

if TYPE_CHECKING:
    from torch import Tensor

    import mobizo_passes as mz
    from lowering.footprint import Footprint
    from lowering.lowered import Lowered
    from mobizo_cli.build import Prepared
    from mobizo_cli.options import BuildOptions

AUTO = "auto"
#: What learns more in the same time comes first: an exact gradient, then the exact slopes along random directions, then
#: differences of losses. Estimators that are not listed come last, in the order in which they were registered.
PREFERENCE = ("exact", "forward-gradient", "two-sided", "one-sided")


@dataclass(frozen=True)
class Candidate:
    """A way to train: the estimator's name, the layers with LoRA (None: all), and where checkpoints are, if any."""

    estimator: str
    layers: str | None
    checkpoint: str | None = None

    def options(self, options: BuildOptions) -> BuildOptions:
        return replace(options, estimator=self.estimator, layers=self.layers, checkpoint=self.checkpoint)


@dataclass(frozen=True)
class Planned:
    """A candidate with what it takes; a `refused` one has nothing but the reason.

    `seconds` is the wall time of one step, `measured_peak_bytes` the peak resident set of the process that ran it, the
    Python runtime included; None where nothing was run.
    """

    candidate: Candidate
    footprint: Footprint | None = None
    refused: str = ""
    seconds: float | None = None
    measured_peak_bytes: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The estimate, which is there whether or not anything was run: the same choice on every machine."""
        return None if self.footprint is None else self.footprint.peak_bytes

    def fits(self, most: int | None) -> bool:
        peak = self.peak_bytes
        return peak is not None and (most is None or peak <= most)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "estimator": self.candidate.estimator,
            "layers": self.candidate.layers,
            "checkpoint": self.candidate.checkpoint,
            "refused": self.refused or None,
            "seconds": self.seconds,
            "measured_peak_bytes": self.measured_peak_bytes,
            **({} if self.footprint is None else self.footprint.to_dict()),
        }


def estimator_names(only: str | None = None) -> list[str]:
    """Registered estimators by preference, or those of a comma-separated list, in that same order.

    Raises:
        OptionError: a name is not registered.
    """
    from mobizo_passes.zo.estimators import estimator_kinds

    known = [kind.replace("_", "-") for kind in estimator_kinds()]
    ranked = sorted(known, key=lambda name: PREFERENCE.index(name) if name in PREFERENCE else len(PREFERENCE))
    if only is None:
        return ranked
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ranked]
    if unknown or not wanted:
        raise OptionError(f"--estimators {', '.join(unknown)}: expected some of {', '.join(ranked)}.")
    return [name for name in ranked if name in wanted]


def candidates_of(names: Sequence[str], places: Sequence[str | None]) -> list[Candidate]:
    """All to compare, by preference: what learns alike and computes less comes first."""
    from mobizo_cli.build import checkpoints

    return [
        Candidate(name, place, held)
        for name in names
        for held in ((None, "layer") if checkpoints(name) else (None,))
        for place in places
    ]


def upper_half(layers: int) -> str:
    """The upper half of the layers, as `--layers` takes it."""
    return f"{layers // 2}-{layers - 1}" if layers > 2 else f"{layers - 1}"


def parse_bytes(option: str, text: str | None) -> int | None:
    """`1.5GiB`, `800MiB`, `2e9` as bytes.

    Raises:
        OptionError: something else.
    """
    if text is None:
        return None
    units = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d{1,2})?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise OptionError(f"{option} {text}: expected a number above 0 and one of {', '.join(filter(None, units))}.")
    return int(float(found[1]) * units[found[2]])


def choose(planned: Sequence[Planned], most: int | None) -> Planned | None:
    """The first that fits: the list is in order of preference, all layers before the upper half."""
    return next((each for each in planned if each.fits(most)), None)


def reason(chosen: Planned, planned: Sequence[Planned], most: int | None) -> str:
    """Why this one, in a sentence."""
    passed = []
    for each in planned[: planned.index(chosen)]:
        name = title(each.candidate)
        passed.append(f"{name} is refused" if each.refused else f"{name} needs {mebibytes(each.peak_bytes)}")
    room = "" if most is None else f" and fits into {mebibytes(most)}"
    before = f"; {', '.join(passed)}" if passed else ""
    return f"{title(chosen.candidate)} learns most in its time{room}{before}"


def title(candidate: Candidate) -> str:
    held = "" if candidate.checkpoint is None else f" with {candidate.checkpoint} checkpoints"
    return candidate.estimator + ("" if candidate.layers is None else f" on layers {candidate.layers}") + held


def mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f} MiB"


def plan(
    candidates: Sequence[Candidate],
    prepare: Callable[[str | None], Prepared],
    lower: Callable[[mz.TrainingProgram], Lowered],
    batch: Callable[[Prepared], dict[str, Tensor]] | None,
) -> Iterator[Planned]:
    """Compile one candidate after another and say what it takes; with `batch`, run two of its steps too.

    `prepare` gives a model with LoRA on these layers.
    """
    from lowering.errors import LoweringError
    from lowering.footprint import footprint
    from mobizo_passes.errors import MobizoError

    for candidate in candidates:
        prepared = prepare(candidate.layers)
        prepared = replace(prepared, options=candidate.options(prepared.options))
        try:
            program = prepared.transform()
            lowered = lower(program)
        except (MobizoError, LoweringError, ModelError) as error:
            yield Planned(candidate, refused=str(error))
            continue
        taken = footprint(lowered)
        if batch is None:
            yield Planned(candidate, taken)
            continue
        with tempfile.TemporaryDirectory() as directory:
            path = lowered.save(Path(directory) / "step.pte")
            seconds, peak = run_apart(path, batch(prepared))
        yield Planned(candidate, taken, seconds=seconds, measured_peak_bytes=peak)


def first_that_fits(
    prepared: Prepared, lower: Callable[[mz.TrainingProgram], Lowered], most: int | None
) -> tuple[Lowered, str]:
    """What `lower --estimator auto` compiles, and why: the first estimator by preference within `most` bytes.

    Raises:
        OptionError: none is; says what each would need.
    """
    compiled: list[Lowered] = []

    def kept(program: mz.TrainingProgram) -> Lowered:
        compiled.append(lower(program))
        return compiled[-1]

    candidates = candidates_of(estimator_names(), [prepared.options.layers])
    tried: list[Planned] = []
    for each in plan(candidates, lambda _: prepared, kept, None):
        tried.append(each)
        if each.fits(most):
            return compiled[-1], reason(each, tried, most)
        if each.refused:
            note(f"{title(each.candidate)}: {each.refused}")
    raise OptionError(nothing_fits(tried, most))


def nothing_fits(planned: Sequence[Planned], most: int | None) -> str:
    """What to say when no candidate is within `most` bytes."""
    needs = [f"{title(each.candidate)} {each.refused or mebibytes(each.peak_bytes)}" for each in planned]
    room = "" if most is None else f"--max-memory {mebibytes(most)}: "
    return (
        f"{room}no estimator fits: {'; '.join(needs)}. Make --batch, --max-length or --queries smaller, or put LoRA on "
        "fewer of the upper layers (--layers)."
    )


def run_apart(path: Path, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Seconds of the second step on this batch, and the peak resident set in bytes, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_steps, path, batch).result()


def run_steps(path: Path, batch: dict[str, Tensor]) -> tuple[float, int]:
    """Do two steps: the first loads the method and packs its weights."""
    import time

    import runtime_driver

    session = runtime_driver.Session(path, verify=False)
    roles = {each.role for each in session.manifest.methods["step"].inputs}
    elapsed = 0.0
    for number in range(2):
        start = time.perf_counter()
        session.step(batch, number if "seed" in roles else None, 1e-6, 1e-3 if "eps" in roles else None)
        elapsed = time.perf_counter() - start
    return elapsed, runtime_driver.peak_rss_bytes()


def layers_of(prepared: Prepared) -> int | None:
    """How many layers the model has, if it says so and LoRA may be put on some of them."""
    from mobizo_cli.adapter import adapter_directory

    if adapter_directory(prepared.options.model) is not None:
        return None
    count = getattr(getattr(prepared.loaded.model, "config", None), "num_hidden_layers", None)
    return count if isinstance(count, int) and count > 1 else None


def placements(options: BuildOptions, layers: int | None) -> list[str | None]:
    """Layers with LoRA to compare: those that the options name, or all and the upper half."""
    if options.layers is not None:
        parse_layers(options.layers)
        return [options.layers]
    return [None] if layers is None else [None, upper_half(layers)]
