"""Training runs side by side: each one trains in a process of its own, then its adapters are evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.learning.contenders import CONTENDERS
from benchmarks.learning.evaluate import accuracies
from benchmarks.step_time import environment


@dataclass(frozen=True)
class Run:
    """What decides a run: with the same fields it need not be done again."""

    task: str
    contender: str
    seed: int
    learning_rate: float
    marks: tuple[float, ...]
    part: str
    size: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        return f"{self.task} / {self.contender} / seed {self.seed} / lr {self.learning_rate:g}"

    def key(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Machinery:
    """Where runs happen: `out` holds programs, adapters and the log; `evaluators` are processes that measure."""

    out: Path
    threads: int
    evaluators: Executor
    tell: Callable[[Run, float], None]

    @property
    def log(self) -> Path:
        return self.out / "time_to_accuracy.log"

    def compile(self, task: str, contender: str) -> Path:
        """The program of a compiled contender, made now unless it is there."""
        command = [sys.executable, "-m", "benchmarks.learning.programs", "--task", task, "--contender", contender]
        command += ["--directory", str(self.out / "programs")]
        with self.log.open("a", encoding="utf-8") as errors:
            made = subprocess.run(
                command, env=environment(self.threads), stdout=subprocess.PIPE, stderr=errors, text=True
            )
        if made.returncode:
            raise RuntimeError(f"compiling {contender!r} for {task!r} failed; see {self.log}")
        return Path(made.stdout.strip())

    def do(self, run: Run, program: Path | None) -> dict[str, Any]:
        """Train and evaluate; returns the run's record, with a point for each mark and one for the start."""
        with tempfile.TemporaryDirectory(dir=self.out, prefix="adapters-") as scratch:
            points = list(self._train(run, program, Path(scratch)))
            adapters = [None, *(Path(point.pop("adapter")) for point in points)]
            measured = self.evaluators.submit(accuracies, run.task, run.part, run.size, adapters, run.threads).result()
        points.insert(0, {"cpu_seconds": 0.0, "steps": 0, "examples": 0})
        for point, accuracy in zip(points, measured, strict=True):
            point["accuracy"] = accuracy
        peak = points[-1].pop("peak_bytes")
        for point in points[:-1]:
            point.pop("peak_bytes", None)
        return {**run.key(), "peak_bytes": peak, "points": points}

    def _train(self, run: Run, program: Path | None, scratch: Path) -> Iterator[dict[str, Any]]:
        command = [sys.executable, "-m", "benchmarks.learning.train", "--task", run.task, "--contender", run.contender]
        command += ["--seed", str(run.seed), "--learning-rate", str(run.learning_rate), "--directory", str(scratch)]
        command += ["--threads", str(run.threads), "--marks", *map(str, run.marks)]
        if program is not None:
            command += ["--program", str(program)]
        with self.log.open("a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command, env=environment(run.threads), stdout=subprocess.PIPE, stderr=errors, text=True
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    point: dict[str, Any] = json.loads(line)
                    self.tell(run, point["cpu_seconds"])
                    yield point
            finally:
                process.stdout.close()
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.terminate()
                code = process.wait()
        if code:
            raise RuntimeError(f"the run {run.title} ended with exit code {code}; see {self.log}")


def do_all(
    runs: Sequence[Run], out: Path, jobs: int, threads: int, tell: Callable[[Run, float], None]
) -> Iterator[dict[str, Any]]:
    """Records of the runs as they end. Programs are compiled first: compiling would slow down what trains."""
    if not runs:
        return
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as evaluators,
        ThreadPoolExecutor(jobs) as pool,
    ):
        machinery = Machinery(out, threads, evaluators, tell)
        wanted = dict.fromkeys((r.task, r.contender) for r in runs if CONTENDERS[r.contender].engine == "executorch")
        programs = dict(zip(wanted, pool.map(lambda pair: machinery.compile(*pair), wanted), strict=True))
        doing = [pool.submit(machinery.do, run, programs.get((run.task, run.contender))) for run in runs]
        try:
            for future in as_completed(doing):
                yield future.result()
        finally:
            for future in doing:
                future.cancel()
