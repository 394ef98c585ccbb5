"""How far a lowered step is from the float32 program, on batches of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowering.calibration import named_batch
from lowering.errors import InvalidCalibration
from lowering.method_runner import MethodRunner, stored
from lowering.passes.values.widen_halves import widened
from lowering.report import Fidelity
from lowering.targets import get_target, options_of
from runtime_driver.format import Manifest

if TYPE_CHECKING:
    from lowering.lowered import Lowered
    from lowering.stages import Program

LR, EPS = 1e-3, 1e-2
Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def measured(
    lowered: Lowered,
    program: Program,
    batches: Sequence[Any],
    calibration: Sequence[Any] | None = None,
    weights_file: Path | None = None,
) -> Fidelity:
    """`lowering.fidelity`."""
    given = [named_batch(lowered.manifest, number, batch, "measure") for number, batch in enumerate(batches)]
    if not given:
        raise InvalidCalibration("there is no batch in it", "measure")
    lowered_as = {"target": lowered.manifest.target, "program_id": lowered.manifest.program_id}
    external = Manifest.model_validate({**program.manifest("external"), **lowered_as})
    specs = external.methods["step"]
    reference = widened(program.core("step", "external")).module()

    def in_float32(values: dict[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            found = reference(*(values[each.name] for each in specs.inputs))
        return dict(zip((each.name for each in specs.outputs), found, strict=True))

    target = get_target(lowered.manifest.target)
    runs = target.survey().runs
    inputs = [_inputs(external, program, batch, number) for number, batch in enumerate(given)]
    wanted = [_told(external, values, in_float32(values)) for values in inputs]
    worst: list[tuple[float, float, float]] = []
    with _running(lowered, weights_file) if runs else _simulated(lowered, program, calibration) as ways:
        for way in ways:
            found = [_told(external, values, way(values)) for values in inputs]
            worst.append(_errors(found, wanted))
    losses, gradients, signs = zip(*worst, strict=True)
    differences = any(each.role == "eps" for each in specs.inputs)
    return Fidelity(len(given), max(losses), max(gradients), min(signs), not runs, differences)


@contextmanager
def _running(lowered: Lowered, weights_file: Path | None) -> Iterator[list[Run]]:
    """The step in the target's runtime."""
    methods = lowered.manifest.methods["step"]
    with ExitStack() as stack:
        path, data = stack.enter_context(stored(lowered.executorch, weights_file or lowered.weights))
        run = stack.enter_context(MethodRunner("step", path, data))

        def way(values: dict[str, Tensor]) -> Mapping[str, Tensor]:
            found = run([values[each.name] for each in methods.inputs])
            return dict(zip((each.name for each in methods.outputs), found, strict=True))

        yield [way]


@contextmanager
def _simulated(lowered: Lowered, program: Program, calibration: Sequence[Any] | None) -> Iterator[list[Run]]:
    """The step as the target's delegate would round it: to the nearest and, where it computes in halves, cut."""
    from lowering.simulate import simulate

    options = options_of(lowered.manifest)
    simulation = simulate(program, lowered.manifest.target, calibration=calibration, **options)
    step = program.manifest("external")["methods"]["step"]
    names, outputs = ([each["name"] for each in step[kind]] for kind in ("inputs", "outputs"))

    def way(values: dict[str, Tensor], truncate: bool) -> Mapping[str, Tensor]:
        found = simulation.run({name: values[name] for name in names}, truncate=truncate)
        return dict(zip(outputs, found, strict=True))

    yield [partial(way, truncate=each) for each in ((False, True) if simulation.half else (False,))]


def _inputs(manifest: Manifest, program: Program, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Everything that a step takes, by name; the seed is the batch's number."""
    adapter, scalars = program.initial_adapter(), {"seed": number, "lr": LR, "eps": EPS, "optimizer": 0}
    return {
        each.name: adapter[each.name]
        if each.role == "adapter"
        else batch[each.name]
        if each.role == "batch"
        else torch.full(tuple(each.shape), scalars[each.role], dtype=getattr(torch, each.dtype))
        for each in manifest.methods["step"].inputs
    }


def _told(manifest: Manifest, given: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses, and what the step learned of the gradient, in float64."""
    if manifest.estimator.queries:
        return found["losses"].double().reshape(-1), found["projected_gradients"].double()
    moves = [(found[each.fqn].double() - given[each.fqn].double()).reshape(-1) for each in manifest.trainable_adapter]
    return found["loss"].double().reshape(-1), torch.cat(moves)


def _errors(
    found: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[tuple[Tensor, Tensor]]
) -> tuple[float, float, float]:
    """Losses' error, gradients' error, agreement of signs, over all batches."""
    (a_losses, a_gradients), (b_losses, b_gradients) = (
        tuple(torch.cat(each) for each in zip(*values, strict=True)) for values in (found, wanted)
    )
    signs = (a_gradients.sign() == b_gradients.sign()).double().mean()
    return _relative(a_losses, b_losses), _relative(a_gradients, b_gradients), float(signs)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest wanted value; infinite where something is not a number."""
    worst = (found - wanted).abs().nan_to_num(nan=torch.inf).max()
    return float(worst / wanted.abs().max().clamp_min(torch.finfo(torch.float64).tiny))
