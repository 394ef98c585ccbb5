"""The stages of a lowering: legalize, partition, serialize."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
from torch import Tensor
from torch.export import ExportedProgram

from lowering.calibration import Calibration, digest_of
from lowering.checks import (
    check_initial_values,
    check_inputs_alive,
    check_kernels,
    check_methods,
    check_program,
    check_state,
)
from lowering.errors import InvalidProgram, LoweringError, LoweringFailed
from lowering.executorch_compat.edge import edge_config, initial_value_passes, set_constant_method
from lowering.executorch_compat.idle_passes import without_idle_passes
from lowering.executorch_compat.in_place import code_on_demand, rewriting_in_place, values_as_they_are
from lowering.executorch_compat.memoized import memoized
from lowering.executorch_compat.ordering import calls_in_order
from lowering.executorch_compat.programs import rewritten
from lowering.executorch_compat.retracing import as_incremental, copied, without_provenance
from lowering.executorch_compat.tags import TAG, is_tagged
from lowering.graph import method_graph
from lowering.identity import program_id
from lowering.lowered import Lowered
from lowering.passes.values.scale_directions import ScaleDirections
from lowering.passes.values.split_shared_weights import SplitSharedWeights
from lowering.passes.values.tag_weights import TagWeights
from lowering.passes.values.widen_halves import all_widened
from lowering.report import Report, SelfCheck, method_report
from lowering.selfcheck import self_check, why_not
from lowering.targets import Target
from lowering.targets.tied import weights_kept_outside
from lowering.weights_file import WeightsFile, move_weights
from mobizo_passes.graph.passes import Pass, PassRecord
from runtime_driver.format import Manifest

MANIFEST_METHOD = "mobizo_manifest"
ADAPTER_METHOD = "initial_adapter"


class Program(Protocol):
    """What lowering asks of a `mobizo_passes.TrainingProgram`."""

    def core(self, method: str, adapter: str = "external") -> ExportedProgram: ...
    def initial_adapter(self) -> dict[str, Tensor]: ...
    def frozen_adapter(self) -> dict[str, Tensor]: ...
    def manifest(self, adapter: str = "external") -> dict[str, Any]: ...


@dataclass(frozen=True)
class Legal:
    """One method: the transform's program, the legalized one, and the passes that made it."""

    core: ExportedProgram
    program: ExportedProgram
    passes: tuple[PassRecord, ...]


@memoized()
def lower_to(
    program: Program,
    target: Target,
    application: dict[str, Any] | None,
    adapter: str,
    calibration: Sequence[Any] | None,
    external_weights: bool | Path = False,
    check: bool | None = None,
    etrecord: bool = False,
) -> Lowered:
    """`lower`, its arguments checked; `external_weights` is the existing weights file, if one is given."""
    described = program.manifest(adapter)
    target = target.suited(described)
    given = {name: program.core(name, adapter) for name in described["methods"]}
    cores, halves = all_widened(given)
    first = (TagWeights(frozenset(each["fqn"] for each in described["adapter"])),) if external_weights else ()
    # Other ranges are another program.
    options = {**target.recorded, **({} if calibration is None else {"calibration": digest_of(calibration)})}
    manifest = Manifest.model_validate(
        {
            **described,
            "target": target.name,
            "options": options,
            "backend": target.backend,
            "tool_versions": _tool_versions(),
            "program_id": program_id(given, described["model"]["sha256"], target.name, options),
            "application": application or {},
        }
    )
    measured = measured_on(program, manifest, calibration)
    methods = {
        name: legalize(name, core, target, measured, (*first, *in_range(name, core, target, manifest)))
        for name, core in cores.items()
    }
    inside = [each.fqn for each in manifest.trainable_adapter] if adapter == "internal" else []
    state = {name: inside if name == "step" else [] for name in methods}
    for name, each in methods.items():
        check_program(name, each.core, manifest.methods[name], state[name])
    legal = {name: each.program for name, each in methods.items()}
    # A head outside would stand between forward and backward, and cut the body of an exact step in two.
    target, outside, split = placed_weights(legal, target, target.small_share if manifest.estimator.queries else 0.0)
    legal = {name: rewritten(each, (split,))[0] for name, each in legal.items()}
    partitioners = {name: target.partitioner(name, outside) for name in methods}
    constants = {ADAPTER_METHOD: _adapter(program, manifest), MANIFEST_METHOD: manifest.model_dump_json(indent=2)}
    edge = partition(legal, partitioners, target, constants, etrecord)
    reports, graphs = {}, {}
    for name, each in methods.items():
        lowered = edge.exported_program(name)
        check_inputs_alive(name, each.core, lowered, manifest.methods[name])
        check_state(name, each.core, lowered, state[name])
        target.check(name, lowered)
        reasons = target.reasons(partitioners[name])
        reports[name] = method_report(name, lowered, reasons, each.passes)
        graphs[name] = method_graph(lowered, reasons)
    weights: WeightsFile | None = None
    if external_weights:
        weights = move_weights(edge, external_weights if isinstance(external_weights, Path) else None)
        manifest = manifest.model_copy(update={"weights_file": weights.spec})
        # Its hash is known only now, and the manifest is a method of the program.
        set_constant_method(edge, MANIFEST_METHOD, manifest.model_dump_json(indent=2))
    finished = _to_executorch(edge)
    plans = {plan.name: plan for plan in finished.executorch_program.execution_plan}
    for name in methods:
        reports[name] = replace(reports[name], arena_bytes=sum(plans[name].non_const_buffer_sizes))
    check_methods(plans, manifest)
    check_kernels({name: plans[name] for name in methods}, legal)
    for name in methods:
        check_initial_values(name, plans[name], state[name])
    outside_bytes = 0 if weights is None else weights.spec.bytes
    skipped = why_not(target, program, check)
    checked = SelfCheck(skipped=skipped or "")
    if skipped is None:
        beside = (
            external_weights if isinstance(external_weights, Path) else None if weights is None else weights.content
        )
        checked = self_check(program, manifest, target, finished, beside, cores, halves)  # pyright: ignore[reportArgumentType]
    report = Report(target.name, reports, _weight_bytes(cores), _size(finished), outside_bytes, checked, halves)
    return Lowered(manifest, report, finished, graphs, None if weights is None else weights.content, etrecord)


def partition(
    programs: Mapping[str, ExportedProgram],
    partitioners: Mapping[str, Any],
    target: Target,
    constants: dict[str, Any] | None = None,
    etrecord: bool = False,
) -> Any:
    """Legalized methods, partitioned and their delegates compiled, as ExecuTorch's edge manager.

    With `etrecord` it keeps a copy of the graphs as they were before that.

    Raises:
        LoweringFailed: ExecuTorch failed, or the target's stage of it did.
    """
    with target.lowering_context():
        return _to_edge(programs, target, partitioners, constants or {}, etrecord)


def legalize(
    method: str,
    core: ExportedProgram,
    target: Target,
    calibration: Calibration | None,
    first: Sequence[Pass] = (),
) -> Legal:
    """One method after the passes `first` and the target's legalization passes, quantized if there is a calibration.

    Raises:
        LoweringFailed: a pass failed.
    """
    try:
        legal, records = rewritten(core, (*first, *target.passes), target.dialect)
        if calibration is not None:
            with target.quantizing_context():
                legal, further = rewritten(legal, target.quantizing(method, legal, calibration))
            records += further
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringFailed(method, "legalization", f"{type(error).__name__}: {error}") from error
    return Legal(core, legal, records)


def placed_weights(
    legal: Mapping[str, ExportedProgram], target: Target, share: float
) -> tuple[Target, frozenset[str], SplitSharedWeights]:
    """The target fitted to legalized methods, the weights whose products stay outside, and the pass that splits others.

    `share`: that of the step's FLOPs below which the product with a tied table stays outside.
    """
    target = target.fitted(legal)
    outside = weights_kept_outside(legal, share) - target.in_place
    return target, outside, SplitSharedWeights(outside | target.in_place)


def in_range(method: str, core: ExportedProgram, target: Target, manifest: Manifest) -> tuple[Pass, ...]:
    """The pass that keeps the tangents of a step in the range of halves, if it has any and computes in halves."""
    spec = manifest.methods[method]
    seed = next((place for place, each in enumerate(spec.inputs) if each.role == "seed"), None)
    found = [place for place, each in enumerate(spec.outputs) if each.name == "projected_gradients"]
    differences = any(each.role == "eps" for each in spec.inputs)
    if target.precision != "fp16" or seed is None or not found or differences:
        return ()
    inputs, outputs = list(core.graph_signature.user_inputs), list(core.graph_signature.user_outputs)
    return (ScaleDirections(str(inputs[seed]), str(outputs[found[0]])),)


def measured_on(program: Program, manifest: Manifest, batches: Sequence[Any] | None) -> Calibration | None:
    """The batches, checked against the manifest; None where there are none."""
    if batches is None:
        return None
    return Calibration.of(manifest, batches, {**program.initial_adapter(), **program.frozen_adapter()})


def _to_edge(
    programs: Mapping[str, ExportedProgram],
    target: Target,
    partitioners: Mapping[str, Any],
    constants: dict[str, Any],
    etrecord: bool = False,
) -> Any:
    incremental = {
        name: as_incremental(program, target.kept_whole, copied(program.graph)) for name, program in programs.items()
    }
    chosen = {name: [each] if each is not None else [] for name, each in partitioners.items()}
    passes = {name: list(found) for name, each in incremental.items() if (found := target.edge_passes(each))}
    try:
        with (
            torch.no_grad(),
            without_provenance(),
            without_idle_passes(),
            rewriting_in_place(),
            code_on_demand(),
            calls_in_order(),
        ):
            return to_edge_transform_and_lower(
                incremental,  # pyright: ignore[reportArgumentType]
                transform_passes=passes or None,  # pyright: ignore[reportArgumentType]
                partitioner=chosen,
                constant_methods=constants,
                compile_config=edge_config(target.kept_whole),
                generate_etrecord=etrecord,
            )
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringFailed(", ".join(programs), "partitioning", f"{type(error).__name__}: {error}") from error


def _to_executorch(edge: Any) -> Any:
    config = ExecutorchBackendConfig(
        passes=initial_value_passes(edge),
        external_constants=lambda node: TAG if is_tagged(node) else None,
    )
    try:
        with torch.no_grad(), without_provenance(), code_on_demand(), values_as_they_are():
            return edge.to_executorch(config)
    except Exception as error:
        methods = ", ".join(edge.methods)
        raise LoweringFailed(methods, "serialization", f"{type(error).__name__}: {error}") from error


def _adapter(program: Program, manifest: Manifest) -> tuple[Tensor, ...]:
    tensors = {**program.initial_adapter(), **program.frozen_adapter()}
    missing = [each.fqn for each in manifest.adapter if each.fqn not in tensors]
    if missing:
        raise InvalidProgram(f"the manifest lists adapter tensors that the program does not hold: {missing}")
    return tuple(tensors[each.fqn].detach().contiguous() for each in manifest.adapter)


def _weight_bytes(programs: Mapping[str, ExportedProgram]) -> int:
    weights = {value.data_ptr(): value for each in programs.values() for value in each.state_dict.values()}
    return sum(value.numel() * value.element_size() for value in weights.values())


class _Counter:
    """A file that only counts: the program is never held in one piece to learn its size."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        return len(data)


def _size(finished: Any) -> int:
    counter = _Counter()
    finished.write_to_file(counter)
    return counter.bytes


def _tool_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "executorch": version("executorch"),
    }
