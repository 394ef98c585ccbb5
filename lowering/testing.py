"""A lowered program beside its eager form, on batches and adapters of a test's choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowering.errors import LoweringError, NonFiniteExample, SelfCheckFailed, TargetUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from lowering.lowered import Lowered
    from lowering.report import SelfCheck
    from mobizo_passes import TrainingProgram

__all__ = ["check_lowered"]


def check_lowered(
    lowered: Lowered,
    program: TrainingProgram,
    example_inputs: Any = None,
    *,
    adapter: Mapping[str, Tensor] | None = None,
    weights_file: str | Path | None = None,
) -> SelfCheck:
    """Run every method in the target's runtime and eagerly on the same inputs, and compare all outputs.

    It is the check that `lower` makes, on other inputs than the program was compiled with; returns what was compared.

    Args:
        lowered: what `lower` made of `program`.
        program: the transformed program.
        example_inputs: a tuple or a dict of the structure, shapes and dtypes of the program's example inputs; None:
            those.
        adapter: FQN -> float32 tensor, for a program with its adapter outside; None: the program's initial one. Either
            is moved a little by fixed noise.
        weights_file: the .ptd of another program, if `lowered` leaves out the weights that are in it.

    Raises:
        SelfCheckFailed: the runtime fails, or an output differs by more than rounding explains.
        NonFiniteExample: the eager program's own losses are not finite.
        TargetUnavailable: the target's runtime is not here.
        LoweringError: an adapter is given, and the program holds its own.
        mobizo_passes.InputError: the inputs or the adapter do not fit the program.
    """
    from lowering.passes.values.widen_halves import all_widened
    from lowering.selfcheck import self_check, why_not
    from lowering.targets import get_target, options_of
    from mobizo_passes.capture.inputs import bind_inputs

    manifest = lowered.manifest
    target = get_target(manifest.target).configured(options_of(manifest))
    missing = why_not(target, program, check=True)
    if missing is not None:
        raise TargetUnavailable(manifest.target, missing, "lowering.available() says what is missing and how to get it")
    if adapter is not None and manifest.adapter_state == "internal":
        raise LoweringError("the program holds its adapter inside: leave out adapter=, or lower with it outside")
    batch = program.example_batch() if example_inputs is None else bind_inputs(program.inputs, example_inputs)
    given = _Given(program, batch, program.initial_adapter() if adapter is None else dict(adapter))
    cores, halves = all_widened({name: program.core(name, manifest.adapter_state) for name in manifest.methods})
    weights = lowered.weights if weights_file is None else Path(weights_file)
    try:
        return self_check(given, manifest, target, lowered.executorch, weights, cores, halves)
    except (NonFiniteExample, SelfCheckFailed) as failure:
        raise failure.in_a_test() from failure.__cause__


class _Given:
    """A program with other example inputs and another adapter."""

    def __init__(self, program: TrainingProgram, batch: dict[str, Tensor], adapter: dict[str, Tensor]) -> None:
        self.run = program.run
        self.example_batch = batch.copy
        self.initial_adapter = adapter.copy
