"""The compiled contenders and the compilation they share. A timed process loads a .pte and the driver only."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

from benchmarks.task import EPSILON, EXACT_LEARNING_RATE, LAYERS, LEARNING_RATE, Task, load_lora_model, make_batch

JOINT = "joint-graph"
COMPILER_PACKAGES = ("mobizo_passes", "runtime_driver.format", "lowering")
#: What makes the model and the batch.
TASK_FILES = tuple(Path(__file__).with_name(name) for name in ("compiled.py", "joint_graph.py", "task.py"))


def compiler_digest(*more: Path) -> str:
    """A digest of the compiler's sources and of these files: programs made by the same ones are the same."""
    digest = hashlib.sha256()
    for package in COMPILER_PACKAGES:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            for source in sorted(Path(location).rglob("*.py")):
                digest.update(source.read_bytes())
    for source in more:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def program_path(directory: Path, target: str, upper_layers: int, estimator: str, layers: int = LAYERS) -> Path:
    """Where the program with these options belongs; the name holds a digest of the compiler that would make it."""
    name = f"{target}-{estimator}-upper{upper_layers}-of{layers}-{compiler_digest(*TASK_FILES)}"
    return directory / name / "step.pte"


def compile_step(directory: Path, target: str, upper_layers: int, estimator: str, layers: int = LAYERS) -> Path:
    """Transform and lower the task's model, unless a program of the same compiler is there already.

    The exact step is what eager backprop does: AdamW on both factors.
    """
    path = program_path(directory, target, upper_layers, estimator, layers)
    if path.exists():
        return path
    import lowering
    import mobizo_passes as mz

    task = Task()
    model = load_lora_model(task, upper_layers, layers)
    batch = make_batch(task)
    if estimator.startswith("exact"):
        exact = mz.Exact(checkpoint="layer" if estimator == "exact-checkpointed" else None)
        program = mz.transform(model, batch, estimator=exact, optimizer=mz.AdamW(), trainable="lora_A+lora_B")
    else:
        kind = mz.ForwardGradient if estimator == "forward-gradient" else mz.TwoSided
        program = mz.transform(model, batch, estimator=kind(queries=task.queries))
    lowered = lowering.lower(program, target=target)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "report.txt").write_text(f"{lowered.report}\n", encoding="utf-8")
    lowered.save(path)
    return path


class CompiledStep:
    """One call of the program's `step`: 2q perturbed forwards, one with q tangents or its gradient; the update."""

    def __init__(self, task: Task, program: Path) -> None:
        import runtime_driver

        self.session = runtime_driver.Session(program)
        self.batch = make_batch(task)
        self.exact = self.session.manifest.estimator.queries == 0

    def step(self, number: int) -> float:
        if self.exact:
            return self.session.step(self.batch, lr=EXACT_LEARNING_RATE).loss
        eps = EPSILON if self.session.perturbs else None
        return self.session.step(self.batch, seed=number, lr=LEARNING_RATE, eps=eps).loss


class CompiledLosses:
    """2q calls of the program's `loss`: what the same forwards cost one at a time, without perturbation or update."""

    def __init__(self, task: Task, program: Path) -> None:
        import runtime_driver

        self.session = runtime_driver.Session(program)
        self.batch = make_batch(task)
        self.calls = 2 * task.queries

    def step(self, number: int) -> float:
        return sum(self.session.batch_loss(self.batch) for _ in range(self.calls)) / self.calls


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the benchmark's program and print where it is.")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--target", default="xnnpack")
    parser.add_argument("--upper-layers", type=int, default=LAYERS)
    parser.add_argument("--layers", type=int, default=LAYERS)
    estimators = ("two-sided", "forward-gradient", "exact", "exact-checkpointed", JOINT)
    parser.add_argument("--estimator", choices=estimators, default="two-sided")
    options = parser.parse_args()
    answer, sys.stdout = sys.stdout, sys.stderr
    if options.estimator == JOINT:
        from benchmarks.joint_graph import compile_joint

        path = program_path(options.directory, options.target, options.layers, JOINT, options.layers)
        print(compile_joint(path, options.layers), file=answer)
        return
    path = compile_step(options.directory, options.target, options.upper_layers, options.estimator, options.layers)
    print(path, file=answer)


if __name__ == "__main__":
    main()
