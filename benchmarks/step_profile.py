"""Where the time of one training step goes: in the delegate, or in which of ExecuTorch's own kernels.

    python benchmarks/step_profile.py model.pte [--rounds 5]

The runtime's own events (ETDump), read with ExecuTorch's developer tools. Times do not depend on the batch's values:
every input is ones, and the adapter is the initial one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

WHOLE, DELEGATE, KERNEL = "Method::execute", "DELEGATE_CALL", "native_call_"
# Kernels that the table names; the others are one row.
NAMED = 8


def inputs_of(path: Path, method: str) -> list[Tensor]:
    """The adapter in the program and ones for everything else."""
    import torch

    import runtime_driver

    session = runtime_driver.Session(path)
    adapter: dict[str, Any] = dict(session.adapter)
    return [
        adapter[spec.name] if spec.name in adapter else torch.ones(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in session.manifest.methods[method].inputs
    ]


def profile(path: Path, method: str = "step", rounds: int = 5) -> dict[str, float]:
    """Median milliseconds over `rounds` executions after one to warm up, by event name."""
    from executorch.devtools import Inspector
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    inputs = inputs_of(path, method)
    seen: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            # A module of its own each time: events of one add up in its dump.
            module = _load_for_executorch(str(path), enable_etdump=True)
            module.run_method(method, inputs)
            dump = Path(folder) / f"{number}.etdump"
            module.write_etdump_result_to_file(str(dump), str(dump.with_suffix(".debug")))
            events: dict[str, float] = defaultdict(float)
            for block in Inspector(etdump_path=str(dump)).event_blocks:
                for event in block.events if block.name == "Execute" else ():
                    events[event.name] += event.perf_data.avg if event.perf_data is not None else 0.0
            seen.append(events)
    names = {name for events in seen[1:] for name in events}
    return {name: statistics.median(events[name] for events in seen[1:]) for name in names}


def shares(times: dict[str, float]) -> tuple[float, float, dict[str, float]]:
    """(Share of the delegate, share of ExecuTorch's kernels, milliseconds of each kernel, the slowest first)."""
    kernels = {name.removeprefix(KERNEL): each for name, each in times.items() if name.startswith(KERNEL)}
    whole = times[WHOLE]
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1]))
    return times.get(DELEGATE, 0.0) / whole, sum(kernels.values()) / whole, ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="a .pte with its weights inside")
    parser.add_argument("--method", default="step")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    times = profile(options.program, options.method, options.rounds)
    delegate, kernels, each = shares(times)
    table = Table(title=f"{options.method} of {options.program.name}: {times[WHOLE]:.1f} ms")
    table.add_column("where")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    rows = [("delegate", times.get(DELEGATE, 0.0)), *list(each.items())[:NAMED]]
    rows.append(("other kernels", sum(list(each.values())[NAMED:])))
    for name, value in rows:
        table.add_row(name, f"{value:.2f}", f"{value / times[WHOLE]:.2%}")
    Console().print(table)
    print(f"{delegate:.1%} in the delegate, {kernels:.1%} in ExecuTorch's own kernels")


if __name__ == "__main__":
    main()
