"""What of a target can be used on this machine."""

from __future__ import annotations

from dataclasses import dataclass

NO_EXECUTORCH = "the executorch package is not installed"


@dataclass(frozen=True)
class Availability:
    """Whether a target can be used on this machine; if not, what is missing and how to get it.

    `ready`: programs can be lowered to it here. `runs`: this machine's ExecuTorch runtime can execute them; where it
    cannot, `runs_missing` says why and `runs_remedy` what can.
    """

    target: str
    ready: bool
    missing: str = ""
    remedy: str = ""
    runs: bool = True
    runs_missing: str = ""
    runs_remedy: str = ""

    def __str__(self) -> str:
        compiles = "lowers here" if self.ready else f"does not lower here: {self.missing}; {self.remedy}"
        runs = "runs here" if self.runs else f"does not run here: {self.runs_missing}; {self.runs_remedy}"
        return f"{self.target}: {compiles}; {runs}"


def executorch_availability(target: str) -> Availability:
    """Ready when the `executorch` package can be found."""
    from importlib.util import find_spec

    if find_spec("executorch") is None:
        return Availability(target, False, NO_EXECUTORCH, 'pip install "mobizo[executorch]"')
    return Availability(target, True)
