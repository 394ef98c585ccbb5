"""One contender in a process of its own; `step_time.py` starts it and tells it when to step."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.task import Contender, Task, serve


def build(name: str, task: Task, program: Path | None) -> Contender:
    """The contender called `name`; the compiled ones need the `program` they run."""
    if program is not None:
        # No transformers, no compiler in here: the peak memory reported is that of a training device.
        from benchmarks.compiled import JOINT, CompiledLosses, CompiledStep

        if name == JOINT:
            from benchmarks.joint_graph import JointGraph

            return JointGraph(task, program)

        return CompiledLosses(task, program) if name == "losses" else CompiledStep(task, program)
    from benchmarks.eager import CONTENDERS

    return CONTENDERS[name](task)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--program", type=Path)
    options = parser.parse_args()
    serve(build(options.name, Task(), options.program))


if __name__ == "__main__":
    main()
