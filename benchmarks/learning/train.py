"""One training run in a process of its own, which keeps the adapter at given amounts of CPU time.

What counts is the process's CPU time, of all its threads, spent in steps: not the making of prompts, not the writing
of adapters, not the loading of model or program. A line of JSON per kept adapter goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.learning.contenders import CONTENDERS
from benchmarks.learning.learners import make_learner
from benchmarks.learning.tasks import BATCH, TASKS
from benchmarks.task import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--contender", choices=CONTENDERS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--marks", type=float, nargs="+", required=True, help="CPU seconds, ascending")
    parser.add_argument("--directory", type=Path, required=True, help="where adapters go")
    parser.add_argument("--program", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    answer, sys.stdout = sys.stdout, sys.stderr
    from safetensors.torch import save_file

    task, contender = TASKS[options.task], CONTENDERS[options.contender]
    word_ids = list(task.encoder().label_ids)
    learner = make_learner(contender, options.learning_rate, word_ids, options.seed, options.program, options.threads)
    marks: list[float] = list(options.marks)
    spent, steps, losses = 0.0, 0, list[float]()
    for batch in task.training_batches(options.seed):
        start = time.process_time()
        losses.append(learner.step(steps, batch))
        spent += time.process_time() - start
        steps += 1
        if spent < marks[0]:
            continue
        while marks and spent >= marks[0]:
            marks.pop(0)
        path = options.directory / f"step-{steps}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in learner.adapter().items()}, path)
        point = {"cpu_seconds": spent, "steps": steps, "examples": steps * BATCH, "loss": statistics.fmean(losses)}
        print(json.dumps({**point, "peak_bytes": peak_memory(), "adapter": str(path)}), file=answer, flush=True)
        losses.clear()
        if not marks:
            break


if __name__ == "__main__":
    main()
