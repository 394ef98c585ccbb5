"""What a target is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lowering.errors import (
    InvalidCalibration,
    InvalidOption,
    TargetUnavailable,
    UnknownOption,
)
from lowering.executorch_compat.runtime import registered_backends
from lowering.targets.availability import NO_EXECUTORCH, Availability, executorch_availability
from lowering.targets.options import TargetOption

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lowering.calibration import Calibration
    from lowering.report import Refusal
    from mobizo_passes.graph.dialect import Dialect
    from mobizo_passes.graph.passes import Pass


class Target(ABC):
    """A place where lowered programs run. One subclass a folder, one instance in the registry.

    `precisions` are what it can compute in, the default first; `options` are further keywords of `lower` that it takes.
    `implied` names those whose default is left out of the manifest and of the program's id, so that a program that was
    lowered before the option existed keeps its id. `backend` is the name under which its delegate registers itself in
    ExecuTorch's runtime (None: it needs none), `runtime` what brings such a runtime. A product with a tied embedding
    table that takes less than `small_share` of the step's FLOPs stays outside, so that the table is in the file once.
    `external_weights`: whether weights can be in a file outside of the program. `checks_itself`: whether a program is
    run beside its eager form before it is given out, unless the caller says otherwise; not where a simulator runs it.
    `in_place` are FQNs of weights that its delegate reads where they are, once it is `fitted` to a program; of others
    it keeps copies in a form of its own.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    options: ClassVar[tuple[TargetOption, ...]] = ()
    implied: ClassVar[frozenset[str]] = frozenset({"precision"})
    backend: ClassVar[str | None] = None
    runtime: ClassVar[str] = 'pip install "mobizo[executorch]"'
    small_share: ClassVar[float] = 0.01
    external_weights: ClassVar[bool] = False
    checks_itself: ClassVar[bool] = True
    precision_help: ClassVar[str] = "What the program computes in."
    in_place: frozenset[str] = frozenset()
    _asked: Mapping[str, str] = MappingProxyType({})

    def suited(self, manifest: Mapping[str, Any]) -> Self:
        """This target as it is best for a program with this manifest, where the caller has not chosen otherwise."""
        return self

    def fitted(self, programs: Mapping[str, ExportedProgram]) -> Self:
        """This target, having seen the legalized methods that it is going to partition."""
        return self

    def availability(self) -> Availability:
        """Looks for what lowering needs, ExecuTorch if nothing else; imports nothing heavy."""
        return executorch_availability(self.name)

    @property
    @abstractmethod
    def passes(self) -> Sequence[Pass]:
        """The legalization passes, in order."""

    @property
    def dialect(self) -> Dialect:
        """What may stand in a legalized program."""
        from lowering.dialect import COPIED, legal

        return legal(self.name, COPIED)

    @abstractmethod
    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        """A fresh ExecuTorch partitioner for one method, or None to run everything on portable kernels.

        `outside`: FQNs of weights whose products should stay on portable kernels.
        """

    def quantizing(self, method: str, legal: ExportedProgram, calibration: Calibration) -> Sequence[Pass]:
        """Passes that follow `passes` where the chosen options quantize; `legal` is the method as those left it."""
        raise NotImplementedError

    @property
    def quantizes(self) -> bool:
        """Whether the chosen options round values to integers, so that their ranges have to be known."""
        return False

    def edge_passes(self, program: ExportedProgram) -> Sequence[Any]:
        """ExecuTorch passes over a method in the edge dialect, before it is partitioned."""
        return ()

    def quantizing_context(self) -> AbstractContextManager[None]:
        """What must hold around `quantizing`'s passes; nothing for most targets."""
        return nullcontext()

    def lowering_context(self) -> AbstractContextManager[None]:
        """What must hold around ExecuTorch while it partitions and serializes; nothing for most targets."""
        return nullcontext()

    def reasons(self, partitioner: Any) -> dict[str, Refusal]:
        """Node name -> why that node was not delegated, as recorded by a used partitioner in its `reasons`."""
        return dict(getattr(partitioner, "reasons", {}))

    def check(self, method: str, partitioned: ExportedProgram) -> None:  # noqa: B027
        """Raise a `LoweringError` when a partitioned method breaks a rule of the runtime; few targets have rules."""

    @property
    def kept_whole(self) -> tuple[Any, ...]:
        """ATen operators that ExecuTorch must not decompose: the delegate takes them, or there is a kernel."""
        from lowering.executorch_compat.retracing import KEPT_WHOLE

        return KEPT_WHOLE

    @property
    def loss_tolerance(self) -> float:
        """How far a loss may be from the eager program's, relative to the larger of it and 1.

        In float32 the delegates sum in other orders than PyTorch; 8e-7 is the most seen on models of any size, and 2e-5
        what `mobizo_passes.verify` allows for the same reason.
        """
        return 2e-5

    @property
    def logits_tolerance(self) -> float:
        """How far a logit may be off, relative to the largest: it is one value where a loss is a mean of many."""
        return 5 * self.loss_tolerance

    @property
    def all_options(self) -> tuple[TargetOption, ...]:
        """The precision and the target's own options."""
        return (TargetOption("precision", self.precisions, self.precisions[0], self.precision_help), *self.options)

    @property
    def chosen(self) -> dict[str, str]:
        """The precision and every option with its value: what the caller asked for, else the default."""
        return {option.name: self._asked.get(option.name, option.default) for option in self.all_options}

    @property
    def precision(self) -> str:
        """The chosen precision."""
        return self.chosen["precision"]

    @property
    def recorded(self) -> dict[str, str]:
        """The options as they stand in the manifest and enter the program's id."""
        defaults = {option.name: option.default for option in self.all_options if option.name in self.implied}
        return {name: value for name, value in self.chosen.items() if value != defaults.get(name)}

    def configured(self, options: Mapping[str, object]) -> Self:
        """This target with `options` chosen, the precision among them; the one in the registry stays as it is.

        Raises:
            UnknownOption: the target has no option of that name.
            InvalidOption: it has, but not this value.
        """
        known = {option.name: option for option in self.all_options}
        asked: dict[str, str] = {}
        for name, value in options.items():
            if name not in known:
                raise UnknownOption(name, self.name, known)
            if not isinstance(value, str) or value not in known[name].choices:
                raise InvalidOption(name, value, self.name, known[name].choices)
            asked[name] = value
        target = copy.copy(self)
        target._asked = MappingProxyType(asked)
        return target

    def check_calibration(self, calibration: Sequence[Any] | None) -> None:
        """Raise `InvalidCalibration` where batches are needed and missing, or given and not needed."""
        if self.quantizes and calibration is None:
            raise InvalidCalibration(
                f"target {self.name!r} with {_listed(self.chosen)} needs batches to measure ranges on; "
                "pass calibration=[batch, ...]"
            )
        if calibration is not None and not self.quantizes:
            raise InvalidCalibration(
                f"target {self.name!r} with {_listed(self.chosen)} does not quantize; leave it out"
            )

    def require(self) -> None:
        """Raise `TargetUnavailable` when programs cannot be lowered to the target here."""
        state = self.availability()
        if not state.ready:
            raise TargetUnavailable(self.name, state.missing, state.remedy)

    def survey(self) -> Availability:
        """`availability`, and whether this machine's runtime executes the target's programs (loads that runtime)."""
        state = self.availability()
        backends = registered_backends()
        if backends is None:
            return replace(state, runs=False, runs_missing=NO_EXECUTORCH, runs_remedy=Target.runtime)
        if self.backend is None or self.backend in backends:
            return state
        missing = f"this ExecuTorch runtime has no {self.backend}, only {', '.join(sorted(backends))}"
        return replace(state, runs=False, runs_missing=missing, runs_remedy=self.runtime)


def _listed(options: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
