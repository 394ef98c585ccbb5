"""Run a lowered program once beside its eager form, on the example inputs, before it is given out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lowering.errors import NonFiniteExample, SelfCheckFailed
from lowering.method_runner import MethodRunner, stored
from lowering.report import Compared, SelfCheck
from lowering.targets import Target
from runtime_driver.format import InputSpec, Manifest

# A seed with digits in both halves of its 64 bits, so that a program that drops one half is found out.
SEED, LR, EPS = 0x5DEECE66D, 1e-2, 1e-2
# Trainable tensors are moved by noise of this standard deviation: a lora_B of zeros would hide its site.
SPREAD = 0.02
# An update is a few float32 operations on values below |value| + lr * |g| * the largest |z|.
ROUNDING, LARGEST_NOISE = 1e-5, 4.5
# An exact gradient, whole or along a direction, is a longer chain than a loss, and cancels more; and what an
# optimizer's state is checked with.
GRADIENT_TOLERANCE, STATE = 1e-3, 0.01
# Where one step of rounding at the inputs moves an output by more than its tolerance, this many of them are allowed.
SLACK = 4.0
# What rounding to 11 and to 8 bits at every value of a model does to a loss, relative to the larger of it and 1.
HALF_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}

Values = dict[str, Tensor]


@runtime_checkable
class Checkable(Protocol):
    """What the check asks of a program beside `lowering.stages.Program`; `TrainingProgram` has it."""

    def example_batch(self) -> Values: ...
    def run(self, method: str, inputs: Mapping[str, Tensor]) -> Values: ...
    def initial_adapter(self) -> Values: ...


def why_not(target: Target, program: object, check: bool | None) -> str | None:
    """Why the self-check is not run; None where it is."""
    if check is False:
        return "switched off"
    state = target.survey()
    if not state.runs:
        return state.runs_missing
    if check is None and not target.checks_itself:
        return f"target {target.name!r} runs here in a simulator, which takes minutes; check=True runs it all the same"
    if not isinstance(program, Checkable):
        return "the program keeps no example inputs"
    return None


def self_check(
    program: Checkable,
    manifest: Manifest,
    target: Target,
    finished: Any,
    weights: Any,
    cores: Mapping[str, ExportedProgram] | None = None,
    halves: Collection[str] = (),
) -> SelfCheck:
    """Run every method in the target's runtime and in eager PyTorch on the same inputs, and compare all outputs.

    `finished`: ExecuTorch's program; `weights`: its weights file (a path, or what writes it), if it has one.
    Nothing is left on disk: the files have no name. A model with `halves` is compared with its float32 form `cores`,
    and its losses once more with its own.

    Raises:
        NonFiniteExample: the eager program itself gives a loss, a gradient or an adapter that is not finite.
        SelfCheckFailed: the runtime fails, or an output differs by more than rounding explains.
    """
    with stored(finished, weights) as (path, data):
        eager = program.run if not halves or cores is None else _InFloat32(program, manifest, cores).run
        check = _Check(program, eager, manifest, target, lambda method: MethodRunner(method, path, data), halves)
        for method in manifest.methods:
            getattr(check, method)()
    return SelfCheck(tuple(check.compared))


class _Check:
    """One program under comparison; a method of the program is checked by the method of its name."""

    def __init__(
        self,
        program: Checkable,
        eager: Callable[[str, Values], Values],
        manifest: Manifest,
        target: Target,
        runner: Callable[[str], MethodRunner],
        halves: Collection[str],
    ) -> None:
        self.program = program
        self.eager = eager
        self.halves = halves
        self.manifest = manifest
        self.target = target
        self.runner = runner
        self.batch = program.example_batch()
        self.initial = program.initial_adapter()
        self.adapter = moved(self.initial)
        self.compared: list[Compared] = []
        self.stepped: tuple[Values, Values] | None = None

    def step(self) -> None:
        if not self.manifest.estimator.queries:
            self.outputs("step")
            return
        internal = self.manifest.adapter_state == "internal"
        given = self._inputs("step")
        adapter = self.initial if internal else self.adapter
        # With the adapter inside, the eager form is the same step, given the adapter that the program starts from.
        expected = self._eager("step", {**given, **adapter})
        with self.runner("step") as run:
            found = self._named("step", run(list(given.values())))
            tiny = {name: torch.full_like(value, 1e-12) for name, value in given.items() if name == "eps"}
            again = run(list({**given, **tiny}.values())) if internal else []
        losses = self._losses("step", expected, found, lambda: self._sensitivity("step", {**given, **adapter}))
        differences = "eps" in given
        along = self._gradient_share() * largest(expected["projected_gradients"])
        bound = gradient_bound(self.manifest, expected, losses) if differences else along
        # A derivative is a chain of float32 operations like a loss; a difference's bound has its rounding in it.
        rounding = None if differences else lambda: self._sensitivity("step", {**given, **adapter})
        self._compare("step", "projected_gradients", expected, found, bound, rounding=rounding)
        gradients = found["projected_gradients"]
        updated = self._updated(adapter, gradients, expected, bound)
        if internal:
            self._second(updated[0], self._named("step", again))
            return
        for fqn, limit in updated[1].items():
            self._compare("step", fqn, updated[0], found, limit)
        self.stepped = (updated[0], found)

    def apply(self) -> None:
        given = self._inputs("apply")
        if self.stepped is not None:
            given["projected_gradients"] = self.stepped[1]["projected_gradients"]
        with self.runner("apply") as run:
            found = self._named("apply", run(list(given.values())))
        expected = self._eager("apply", given)
        for fqn, value in expected.items():
            self._compare("apply", fqn, expected, found, update_bound(value, given["projected_gradients"]))
        if self.stepped is not None:
            # Replay and resume rest on it: not one bit may differ.
            for fqn in expected:
                self._compare("apply", fqn, self.stepped[1], found, 0.0, "step's")

    def loss(self) -> None:
        expected, found, given = self._both("loss")
        self._losses("loss", expected, found, lambda: self._sensitivity("loss", given))
        # What an evaluation combines: sums and weights of examples.
        for name in found.keys() - {"loss"}:
            limit = self.target.loss_tolerance * max(1.0, largest(expected[name]))
            self._compare("loss", name, expected, found, limit, rounding=lambda: self._sensitivity("loss", given))
        if self.halves:
            limit = max(HALF_TOLERANCE[each] for each in self.halves) * max(1.0, largest(expected["loss"]))
            own = self.program.run("loss", given)
            self._compare("loss", "loss", own, found, limit, f"the model's own in {' and '.join(self.halves)}")

    def logits(self) -> None:
        expected, found, given = self._both("logits", finite=False)
        limit = self.target.logits_tolerance * largest(expected["logits"])
        self._compare("logits", "logits", expected, found, limit, rounding=lambda: self._sensitivity("logits", given))

    def gradients(self) -> None:
        self.outputs("gradients")

    def outputs(self, method: str) -> None:
        """Compare every output of a method that computes an exact gradient, or a step from one."""
        expected, found, given = self._both(method)
        share = self._gradient_share()
        for spec in self.manifest.methods[method].outputs:
            value = expected[spec.name]
            if spec.role == "loss":
                limit = self.target.loss_tolerance * max(1.0, largest(value))
            elif value.is_floating_point():
                # What the step adds has a gradient's error; what it is added to, rounding's.
                moved_by = largest(value - given[spec.name]) if spec.name in given else largest(value)
                limit = share * moved_by + ROUNDING * largest(value)
            else:
                limit = 0.0
            self._compare(method, spec.name, expected, found, limit, rounding=lambda: self._sensitivity(method, given))

    def _gradient_share(self) -> float:
        """How far a derivative may be off, relative to the largest: it cancels more than a loss does."""
        return max(GRADIENT_TOLERANCE, 10 * self.target.loss_tolerance)

    def _both(self, method: str, finite: bool = True) -> tuple[Values, Values, Values]:
        given = self._inputs(method)
        with self.runner(method) as run:
            found = self._named(method, run(list(given.values())))
        return self._eager(method, given, finite), found, given

    def _second(self, updated: Values, found: Values) -> None:
        """A step that holds its adapter must have written it: the next one, with ε of nearly 0, starts from there."""
        if "loss" not in self.manifest.methods:
            return
        inputs = {**self._inputs("loss"), **updated}
        expected = self._eager("loss", inputs)
        self._losses("step", expected, {"loss": found["loss"]}, lambda: self._sensitivity("loss", inputs))

    def _updated(
        self, adapter: Values, gradients: Tensor, step: Values, bound: float
    ) -> tuple[Values, dict[str, float]]:
        """The adapter that belongs to the runtime's own gradients, and the tolerance of each tensor."""
        if "apply" in self.manifest.methods:
            given = {**self._inputs("apply"), **adapter, "projected_gradients": gradients}
            new, further = self._eager("apply", given), 0.0
        else:
            new, further = {fqn: step[fqn] for fqn in adapter}, LARGEST_NOISE * LR * bound
        return new, {fqn: update_bound(value, gradients) + further for fqn, value in new.items()}

    def _losses(self, method: str, expected: Values, found: Values, rounding: Callable[[], Values]) -> float:
        """Compare `loss` and `losses`; the largest deviation."""
        deviations = [0.0]
        for name in ("loss", "losses"):
            if name in expected and name in found:
                limit = self.target.loss_tolerance * max(1.0, largest(expected[name]))
                deviations.append(self._compare(method, name, expected, found, limit, rounding=rounding))
        return max(deviations)

    def _compare(
        self,
        method: str,
        name: str,
        expected: Values,
        found: Values,
        limit: float,
        beside: str = "the eager program's",
        rounding: Callable[[], Values] | None = None,
    ) -> float:
        deviation, place = deviation_of(expected[name], found[name])
        if deviation > limit and rounding is not None and math.isfinite(deviation):
            # Where float32 itself does not settle the output, no order of summation is wrong.
            limit = max(limit, SLACK * float(rounding()[name].abs().max()))
        if not deviation <= limit:
            raise SelfCheckFailed.differs(method, name, deviation, limit, place, expected[name], found[name], beside)
        self.compared.append(Compared(method, name, deviation, limit))
        return deviation

    def _sensitivity(self, method: str, inputs: Values) -> Values:
        """How far each output of the eager program moves when its floating-point inputs move by their last bit."""
        first = self.eager(method, inputs)
        spread = {name: torch.zeros_like(value) for name, value in first.items()}
        for sign in (1, -1):
            near = {
                name: value * (1 + sign * torch.finfo(value.dtype).eps)
                if value.is_floating_point() and name not in ("eps", "lr")
                else value
                for name, value in inputs.items()
            }
            for name, value in self.eager(method, near).items():
                spread[name] = torch.maximum(spread[name], (value - first[name]).abs().nan_to_num())
        return spread

    def _inputs(self, method: str) -> Values:
        return {spec.name: self._value(spec) for spec in self.manifest.methods[method].inputs}

    def _value(self, spec: InputSpec) -> Tensor:
        if spec.role == "adapter":
            return self.adapter[spec.name]
        if spec.role == "batch":
            return self.batch[spec.name]
        if spec.role == "seed":
            return torch.full(tuple(spec.shape), SEED, dtype=torch.int64)
        if spec.role == "optimizer":
            # As after some steps: where Adam's second moment is 0, a step is the gradient's sign, rounding and all.
            return torch.full(tuple(spec.shape), STATE if spec.dtype == "float32" else 3).to(getattr(torch, spec.dtype))
        if spec.role == "projected_gradients":
            return torch.linspace(-0.5, 0.75, spec.shape[0])
        return torch.full(tuple(spec.shape), {"lr": LR, "eps": EPS}[spec.role])

    def _named(self, method: str, values: list[Tensor]) -> Values:
        return {spec.name: value for spec, value in zip(self.manifest.methods[method].outputs, values, strict=True)}

    def _eager(self, method: str, inputs: Values, finite: bool = True) -> Values:
        values = self.eager(method, inputs)
        for name, value in values.items() if finite else ():
            if not bool(value.isfinite().all()):
                raise NonFiniteExample(method, name, int((~value.isfinite()).sum()), value.numel())
        return values


class _InFloat32:
    """A half-precision program as it was before it was legalized, but computed in float32."""

    def __init__(self, program: Checkable, manifest: Manifest, cores: Mapping[str, ExportedProgram]) -> None:
        self.program = program
        self.manifest = manifest
        self.cores = cores

    def run(self, method: str, inputs: Values) -> Values:
        """The method's outputs by name."""
        if method == "step" and self.manifest.adapter_state == "internal":
            return self.program.run(method, inputs)
        spec = self.manifest.methods[method]
        with torch.no_grad():
            values = self.cores[method].module()(*(inputs[each.name] for each in spec.inputs))
        return {each.name: value for each, value in zip(spec.outputs, values, strict=True)}


def moved(adapter: Mapping[str, Tensor]) -> Values:
    """The adapter, moved a little by fixed noise."""
    generator = torch.Generator().manual_seed(0)
    return {
        fqn: value + SPREAD * torch.randn(value.shape, generator=generator).to(value.dtype)
        for fqn, value in adapter.items()
    }


def largest(value: Tensor) -> float:
    """The largest absolute value among the finite ones, 0 if there is none."""
    finite = value[value.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def deviation_of(expected: Tensor, found: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest absolute difference and its place; infinite where one is finite and the other is not."""
    if not expected.numel():
        return 0.0, ()
    a, b = expected.double(), found.double()
    # A masked row that the loss does not read may be NaN in eager, and anything where masks are finite.
    same = (a == b) | a.isnan()
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    place = torch.unravel_index(difference.argmax(), difference.shape)
    return float(difference.max()), tuple(int(index) for index in place)


def update_bound(value: Tensor, gradients: Tensor) -> float:
    """How far an updated tensor may be off that was computed from the same gradients."""
    return ROUNDING * (largest(value) + LARGEST_NOISE * LR * largest(gradients))


def gradient_bound(manifest: Manifest, expected: Mapping[str, Tensor], deviation: float) -> float:
    """How far projected gradients may be off when no loss is off by more than `deviation` and its own last bits.

    The manifest has the factor c of the estimator: c·error/ε bounds what g is off by. Divided by the standard
    deviation s of n losses, g = h/s, it is (c·error/ε + r·|g|) / (s − r), where r = error·√(n/(n−1)) is how far s
    moves; infinite where s is not above r, since rounding alone makes any number of it then.
    """
    losses, gradients = expected["losses"], expected["projected_gradients"]
    error = deviation + 4 * torch.finfo(torch.float32).eps * max(1.0, largest(losses))
    estimator = manifest.estimator
    plain = estimator.error_factor * error / EPS
    if estimator.normalize is None:
        return plain
    groups = estimator.perturbed_groups
    perturbed = losses if groups is None else losses[list(groups)]
    count = len(perturbed)
    std, shift = float(perturbed.double().std()), error * math.sqrt(count / (count - 1))
    return (plain + shift * largest(gradients)) / (std - shift) if std > shift else math.inf
