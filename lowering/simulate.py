"""Run a method as it would be lowered, in eager PyTorch: for targets whose runtime is not at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from lowering.executorch_compat.programs import rewritten
from lowering.passes.values.widen_halves import widened
from lowering.report import MethodReport, method_report
from lowering.stages import Program, in_range, legalize, measured_on, partition, placed_weights
from lowering.targets import get_target
from mobizo_passes.graph.operators import operation_name
from runtime_driver.format import Manifest

_HALF_RANGE = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)


# A float32 value as a float16 one holds it, in float32 again.
Narrow = Callable[[Tensor], Tensor]


def nearest(value: Tensor) -> Tensor:
    """The float16 number next to each float32 one, in float32."""
    return value.half().float()


def truncated(value: Tensor) -> Tensor:
    """Each float32 number cut to float16 towards zero, in float32."""
    half = value.half()
    beyond = half.float().abs() > value.abs()
    return torch.where(beyond, torch.nextafter(half, torch.zeros_like(half)), half).float()


@dataclass(frozen=True)
class Simulation:
    """One method, legalized and partitioned for a target, and its report."""

    partitioned: ExportedProgram
    report: MethodReport
    half: bool

    def run(self, inputs: Mapping[str, Tensor], truncate: bool = False) -> tuple[Tensor, ...]:
        """The method's outputs for `inputs` (in the manifest's order), from the partitioned graph.

        Where the delegate computes in float16, every value inside of it is rounded to float16: to the nearest, or with
        `truncate` towards zero, as some GPUs do. Sums within one operator are still accumulated in float32, so a device
        may be further off than the worse of the two.
        """
        stored: dict[str, Any] = {**self.partitioned.state_dict, **self.partitioned.constants}
        narrow = None if not self.half else truncated if truncate else nearest
        with torch.no_grad():
            return _run(self.partitioned, stored, list(inputs.values()), narrow, inside=False)


def simulate(
    program: Program, target: str, method: str = "step", calibration: Sequence[Any] | None = None, **options: str
) -> Simulation:
    """Legalize and partition one method as `lower` would, and check it by the target's rules; nothing is stored.

    Raises:
        UnknownTarget, TargetUnavailable, UnknownOption, InvalidOption, LoweringFailed, RuleBroken: as `lower`.
        InvalidCalibration: as `lower`.
    """
    chosen = get_target(target).configured(options)
    chosen.require()
    chosen.check_calibration(calibration)
    described = {**program.manifest("external"), "target": target, "program_id": "simulation"}
    manifest = Manifest.model_validate(described)
    measured = measured_on(program, manifest, calibration)
    cores = {name: widened(program.core(name, "external")) for name in {"step", method}}
    made = {
        name: legalize(name, core, chosen, measured, in_range(name, core, chosen, manifest))
        for name, core in cores.items()
    }
    programs = {name: each.program for name, each in made.items()}
    chosen, outside, split = placed_weights(programs, chosen, chosen.small_share)
    legal, _ = rewritten(made[method].program, (split,))
    partitioner = chosen.partitioner(method, outside)
    partitioned = partition({method: legal}, {method: partitioner}, chosen).exported_program(method)
    chosen.check(method, partitioned)
    report = method_report(method, partitioned, chosen.reasons(partitioner), made[method].passes)
    return Simulation(partitioned, report, chosen.precision == "fp16")


def _run(
    program: ExportedProgram, stored: Mapping[str, Any], inputs: list[Tensor], narrow: Narrow | None, inside: bool
) -> tuple[Tensor, ...]:
    signature = program.graph_signature
    places = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    given = iter(inputs)
    runner = _Runner(program, narrow, inside)
    values = [
        runner.constant(stored[places[node.name]]) if node.name in places else runner.rounded(next(given))
        for node in program.graph.nodes
        if node.op == "placeholder"
    ]
    return tuple(runner.run(*values))


class _Runner(Interpreter):
    """Runs one level: delegate calls run as graphs of their own, rounded if they compute in float16."""

    def __init__(self, program: ExportedProgram, narrow: Narrow | None, inside: bool) -> None:
        super().__init__(program.graph_module)
        self.narrow = narrow
        self.within = narrow if inside else None

    def run_node(self, n: Node) -> Any:
        """One node; a delegate call runs its own graph."""
        if n.op == "get_attr":
            return getattr(self.module, str(n.target))
        if operation_name(n) != "executorch_call_delegate":
            result = super().run_node(n)
            return pytree.tree_map_only(Tensor, self.rounded, result) if n.op == "call_function" else result
        (lowered, *arguments), _ = self.fetch_args_kwargs_from_env(n)
        inner = lowered.original_module
        return list(_run(inner, {**inner.state_dict, **inner.constants}, arguments, self.narrow, inside=True))

    def constant(self, value: Tensor) -> Tensor:
        """A constant as the delegate stores it: ExecuTorch cuts what float16 cannot hold down to its largest number."""
        return self.rounded(value.clamp(*_HALF_RANGE)) if self._rounds(value) else value

    def rounded(self, value: Tensor) -> Tensor:
        """A value as the delegate holds it, in float32 again."""
        return self.within(value) if self.within is not None and self._rounds(value) else value

    def _rounds(self, value: Tensor) -> bool:
        return self.within is not None and value.dtype == torch.float32
