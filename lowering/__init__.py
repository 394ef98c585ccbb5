"""Lowering: from a TrainingProgram to one ExecuTorch file that trains itself.

    lowered = lowering.lower(program, target="xnnpack")
    print(lowered.report)
    lowered.save("model.pte")

Importing this package imports neither torch nor ExecuTorch; `lower` does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowering.errors import (
    FrozenInput,
    InvalidCalibration,
    InvalidOption,
    InvalidProgram,
    KernelMissing,
    LoweringError,
    LoweringFailed,
    MethodMismatch,
    NonFiniteExample,
    OperatorNotTaken,
    OptionNameTaken,
    OutputNotOurs,
    RuleBroken,
    SelfCheckFailed,
    StateLost,
    TargetNameTaken,
    TargetUnavailable,
    UnknownAdapterForm,
    UnknownOption,
    UnknownTarget,
    WeightsFileUnusable,
    WeightsStayInside,
)

if TYPE_CHECKING:
    from lowering.lowered import Lowered
    from lowering.report import Fidelity
    from lowering.stages import Program
    from lowering.targets import Availability


def lower(
    program: Program,
    target: str = "xnnpack",
    precision: str | None = None,
    application: dict[str, Any] | None = None,
    adapter: str = "external",
    calibration: Sequence[Any] | None = None,
    external_weights: bool = False,
    weights_file: str | os.PathLike[str] | None = None,
    check: bool | None = None,
    measure: Sequence[Any] | None = None,
    etrecord: bool = False,
    **options: str,
) -> Lowered:
    """Compile a program's methods into one ExecuTorch program, with the initial adapter and the manifest inside.

    Args:
        program: a `mobizo_passes.TrainingProgram` (or anything with its `core`, `manifest` and adapter methods).
        target: `"xnnpack"` (CPU), `"vulkan"` (GPU), `"qnn"` (Qualcomm NPU) or `"portable"`; see `available()`.
        precision: what the program computes in, `"fp32"`, `"fp16"`, `"16a8w"` (activations of 16 bits, weights of 8)
            or `"8a8w"`; each target has a list of its own, `Target.precisions`. None: the target's default.
        application: free-form JSON for the manifest's `application` field, read back by whoever wrote it.
        adapter: `"external"`: the step takes the adapter and returns it. `"internal"`: the step holds it, from the
            initial one on, and writes it at every call (the paper's form; see ADR 6 for what that gives up).
        calibration: batches, as `program.step` takes them, on which the ranges of a quantized program are measured;
            precisions in integers want it, and nothing else does.
        external_weights: the model's frozen weights go to a file of their own, which `save("model.pte")` writes as
            `model.ptd`. Programs of the same model and target write the same file and can share one; see ADR 10.
        weights_file: the .ptd of another program: the weights that are in it are left out of this one, the others (a
            different head, for example) stay inside. Implies `external_weights`.
        check: whether every method is run once on the example inputs, in the target's runtime and in eager PyTorch, and
            the results compared; about two steps' time. None: where that runtime is at hand and no simulator; the
            report says what was compared, or why nothing was. See ADR 15.
        measure: batches, as `program.step` takes them, on which the step is run beside the program in float32:
            `report.fidelity` says how far its losses and gradients are off, and warns above a tenth. Where the target's
            runtime is not at hand, it is simulated; see `fidelity`.
        etrecord: keep what `Lowered.save_etrecord` writes: a copy of the graphs and their weights in memory.
        options: what the target alone understands, such as `soc="SM8750"` for `"qnn"`; see `Target.options`.

    Raises:
        UnknownTarget, TargetUnavailable: the target cannot be used.
        UnknownOption, InvalidOption: the target has no such option, or not this value or precision.
        InvalidCalibration: `calibration` is missing, not wanted, or it or `measure` does not fit the program.
        UnknownAdapterForm: `adapter` is neither.
        WeightsStayInside: external weights, for a target that cannot have them.
        WeightsFileUnusable: `weights_file` is no .ptd, is damaged, or has none of this model's weights.
        OperatorNotTaken: an operator in the midst of the model would cut the target's one delegate call in two.
        KernelMissing: an operator that neither the target's delegate nor ExecuTorch's runtime knows.
        InvalidProgram: the program contradicts its own manifest.
        LoweringFailed: a stage failed; names method and stage.
        FrozenInput, StateLost, MethodMismatch: the result is not what the manifest promises, and is withheld.
        NonFiniteExample: on the example inputs, the program gives losses that are not finite, in eager PyTorch already.
        SelfCheckFailed: the runtime fails on the example inputs, or gives something else than the eager program.
        RuleBroken: it holds something that the target's runtime is known to get wrong, and is withheld.
    """
    from lowering.targets import get_target, require_external_weights

    chosen = get_target(target).configured(options if precision is None else {"precision": precision, **options})
    chosen.require()
    chosen.check_calibration(calibration)
    if adapter not in ("external", "internal"):
        raise UnknownAdapterForm(adapter)
    if external_weights or weights_file is not None:
        require_external_weights(chosen)
    if weights_file is not None:
        from lowering.weights_file import check_weights_file

        check_weights_file(weights_file)
    from lowering.stages import lower_to

    outside = external_weights if weights_file is None else Path(weights_file)
    lowered = lower_to(program, chosen, application, adapter, calibration, outside, check, etrecord)
    if measure is None:
        return lowered
    found = fidelity(lowered, program, measure, calibration, weights_file)
    return replace(lowered, report=replace(lowered.report, fidelity=found))


def fidelity(
    lowered: Lowered,
    program: Program,
    batches: Sequence[Any],
    calibration: Sequence[Any] | None = None,
    weights_file: str | os.PathLike[str] | None = None,
) -> Fidelity:
    """How far the step of a lowered program is from that of `program`, which it was made of, in float32.

    Each batch, as `program.step` takes them, is run once from the initial adapter. Where the target's runtime is at
    hand, it runs the program; elsewhere the partitioned graph is run in PyTorch, in halves both rounded to the nearest
    and cut, of which the worse counts. That takes a second lowering of `step`.

    Args:
        calibration: that of the lowering, if there was one.
        weights_file: the existing file that the weights are in, if it was lowered with one.

    Raises:
        InvalidCalibration: there is no batch, or one does not fit the program.
        SelfCheckFailed: the runtime fails.
    """
    from lowering.gradient_error import measured

    return measured(lowered, program, batches, calibration, None if weights_file is None else Path(weights_file))


def available() -> dict[str, Availability]:
    """Each known target: whether it lowers here and runs here; if not, what is missing and how to get it."""
    from lowering.targets import TARGETS

    return {name: target.survey() for name, target in TARGETS.items()}


__all__ = [
    "FrozenInput",
    "InvalidCalibration",
    "InvalidOption",
    "InvalidProgram",
    "KernelMissing",
    "LoweringError",
    "LoweringFailed",
    "MethodMismatch",
    "NonFiniteExample",
    "OperatorNotTaken",
    "OptionNameTaken",
    "OutputNotOurs",
    "RuleBroken",
    "SelfCheckFailed",
    "StateLost",
    "TargetNameTaken",
    "TargetUnavailable",
    "UnknownAdapterForm",
    "UnknownOption",
    "UnknownTarget",
    "WeightsFileUnusable",
    "WeightsStayInside",
    "available",
    "fidelity",
    "lower",
]
