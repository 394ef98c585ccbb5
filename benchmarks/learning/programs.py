"""Compiles the program of a contender for a task, once, in a process of its own, and prints where it is."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from benchmarks.compiled import compiler_digest
from benchmarks.learning import contenders, tasks
from benchmarks.learning.contenders import CONTENDERS, Contender
from benchmarks.learning.tasks import TASKS, Task


def program_path(directory: Path, task: Task, contender: Contender) -> Path:
    """Where the program belongs; the name holds a digest of compiler, task and contender."""
    digest = hashlib.sha256(compiler_digest().encode())
    digest.update(repr((task.template, task.words, task.tokens, tasks.BATCH, contender.settings())).encode())
    digest.update(repr((contenders.RANK, contenders.UPPER_LAYERS)).encode())
    return directory / f"{task.name}-{contender.name}-{digest.hexdigest()[:12]}" / "step.pte"


def compile_program(directory: Path, task: Task, contender: Contender) -> Path:
    """Transform and lower, unless the same program is there already."""
    path = program_path(directory, task, contender)
    if path.exists():
        return path
    import lowering

    lowered = lowering.lower(contender.program(task), target="xnnpack")
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "report.txt").write_text(f"{lowered.report}\n", encoding="utf-8")
    lowered.save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    options = parser.parse_args()
    answer, sys.stdout = sys.stdout, sys.stderr
    print(compile_program(options.directory, TASKS[options.task], CONTENDERS[options.contender]), file=answer)


if __name__ == "__main__":
    main()
