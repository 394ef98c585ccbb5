"""What a target is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowering.errors import QuantizationNotSupported, TargetUnavailable

if TYPE_CHECKING:
    from lowering.passes.base import LegalisationPass


@dataclass(frozen=True)
class Availability:
    """Whether a target can be used on this machine; if not, what is missing and how to get it."""

    target: str
    ready: bool
    missing: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.target}: ready" if self.ready else f"{self.target}: {self.missing}; {self.remedy}"


class Target(ABC):
    """A place where lowered programs run. One subclass a file, one instance in the registry."""

    name: str
    supported: bool = True

    @abstractmethod
    def availability(self) -> Availability:
        """Looks for what the target needs; imports nothing heavy."""

    @property
    @abstractmethod
    def passes(self) -> Sequence[LegalisationPass]:
        """The legalisation passes, in order."""

    @abstractmethod
    def partitioner(self, method: str, outside: frozenset[str] = frozenset()) -> Any | None:
        """A fresh ExecuTorch partitioner for one method, or None to run everything on portable kernels.

        `outside`: FQNs of weights whose products should stay on portable kernels.
        """

    def reasons(self, partitioner: Any) -> dict[str, str]:
        """Node name -> why that node was not delegated, as recorded by a used partitioner."""
        return dict(getattr(partitioner, "reasons", {}))

    def check_quantize(self, quantize: str | None) -> None:
        """Raise `QuantizationNotSupported` for a quantisation that this target cannot do."""
        if quantize is not None:
            raise QuantizationNotSupported(quantize, self.name)

    def require(self) -> None:
        """Raise `TargetUnavailable` when the target cannot be used here."""
        state = self.availability()
        if not state.ready:
            raise TargetUnavailable(self.name, state.missing, state.remedy)


def executorch_availability(target: str) -> Availability:
    """Ready when the `executorch` package can be found."""
    from importlib.util import find_spec

    if find_spec("executorch") is None:
        return Availability(
            target, False, "the executorch package is not installed", 'pip install "mobizo[executorch]"'
        )
    return Availability(target, True)
