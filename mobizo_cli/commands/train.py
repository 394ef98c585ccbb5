"""`mobizo train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mobizo_cli import options as opt

if TYPE_CHECKING:
    from mobizo_cli.data import ExampleBatches
    from mobizo_cli.loaded_program import Use
    from runtime_driver import NonFiniteError, Session
    from runtime_driver.fleet import Shard, Workers


def train(
    program: opt.ProgramArgument,
    data: Annotated[Path, typer.Option(help="Training data, .jsonl or .csv; {rank} stands for the worker's number.")],
    steps: Annotated[int, typer.Option(min=1, max=2**31, help="Length of the run, steps in the journal included.")],
    adapter_out: Annotated[Path, typer.Option(help="PEFT directory to write.")],
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    eps: Annotated[
        float | None,
        typer.Option(
            help="Radius of the perturbation. [default: 0.01; none where nothing is perturbed]", show_default=False
        ),
    ] = None,
    schedule: Annotated[Literal["constant", "linear"], typer.Option(help="Learning rate over the run.")] = "constant",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise and of the data's order.")] = 0,
    journal: Annotated[
        Path | None, typer.Option(help="Written as the run goes; if it exists, the run resumes from its last step.")
    ] = None,
    adapter: opt.AdapterIn = None,
    weights_file: opt.WeightsFile = None,
    verify: opt.Verify = True,
    backend_library: opt.BackendLibrary = None,
    eval_data: Annotated[Path | None, typer.Option(help="Evaluated at the end.")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Evaluate every so many steps too.")] = None,
    parallel: Annotated[
        Literal["data", "queries"] | None,
        typer.Option(
            help="Under torchrun: workers share the noise and split the data, or share the batch and split the noise."
        ),
    ] = None,
    combine: Annotated[
        Literal["mean", "median", "trimmed_mean"], typer.Option(help="How the workers' projected gradients combine.")
    ] = "mean",
    hash_every: Annotated[
        int, typer.Option(min=1, help="Compare the workers' adapters, by 8 bytes of a hash, every so many steps.")
    ] = 50,
) -> None:
    """Train the adapter of a program. Ctrl-C ends after the running step; with --journal, run again to go on."""
    from mobizo_cli.console import facts, out
    from mobizo_cli.errors import OptionError, TrainingStopped
    from mobizo_cli.loaded_program import open_task

    if eval_every is not None and eval_data is None:
        raise OptionError("--eval-every needs --eval-data.")
    use = open_task(program, weights_file, verify=verify, backends=backend_library)
    session = use.session
    workers = None
    if parallel is not None:
        from runtime_driver.fleet import Workers

        workers = Workers(parallel, combine, hash_every=hash_every)
    elif combine != "mean":
        raise OptionError("--combine needs --parallel.")
    first = workers is None or workers.rank == 0
    if first:
        session.check_writable(adapter_out)
    if adapter is not None:
        session.load_adapter(adapter)
    batches = _batches(use, data, seed, workers)
    held_out = None if eval_data is None else use.eval_batches(use.examples(eval_data))

    from runtime_driver import Constant, LinearDecay, NonFiniteError

    try:
        result = session.fit(
            batches,
            steps,
            lr=Constant(lr) if schedule == "constant" else LinearDecay(lr, steps),
            eps=1e-2 if eps is None and session.perturbs else eps,
            seed=seed,
            journal=journal,
            eval_batches=held_out,
            eval_every=eval_every,
            label_ids=use.in_run_label_ids,
            workers=workers,
        )
    except NonFiniteError as error:
        kept = _keep_last_good(session, error, adapter_out, journal) if first else "Worker 0 keeps the adapter."
        raise TrainingStopped(error, kept) from error
    finally:
        if workers is not None:
            workers.close()
    if not first:
        raise typer.Exit(130 if result.interrupted else 0)
    session.save_adapter(adapter_out)
    rows: list[tuple[str, object]] = [("steps", f"{result.steps} ({result.first_step} from the journal)")]
    if result.losses:
        last = result.losses[-20:]
        rows.append((f"loss, mean of the last {len(last)}", f"{sum(last) / len(last):.4f}"))
    for record in result.evaluations:
        found = record.evaluation
        accuracy = "" if found.accuracy is None else f", accuracy {found.accuracy:.3f}"
        rows.append((f"evaluation at {record.step}", f"loss {found.loss:.4f}{accuracy}, {found.examples} examples"))
    if workers is not None:
        each = workers.step_bytes // max(1, workers.size - 1)
        rows.append(("sent per step", f"{workers.step_bytes} bytes by each of {workers.size} workers ({each} to each)"))
        refused = ", ".join(f"{count} of worker {worker}" for worker, count in sorted(workers.refused.items()))
        rows.append(("contributions refused", refused or "none"))
    rows.append(("time", f"{result.seconds:.1f} s"))
    rows.append(("peak memory", f"{result.peak_memory_bytes / 2**20:.0f} MiB"))
    rows.append(("adapter", adapter_out))
    facts(rows)
    if result.interrupted:
        again = "" if journal is None else "; run the same command again to go on"
        out.print(f"interrupted after step {result.steps} of {steps}{again}", markup=False)
        raise typer.Exit(130)


def _batches(use: Use, data: Path, seed: int, workers: Workers | None) -> ExampleBatches | Shard:
    """All of the file for one process; for several, a file of each worker's own, or its part of one that all read."""
    from mobizo_cli.data import ExampleBatches

    own = workers is not None and "{rank}" in data.name
    path = data.with_name(data.name.replace("{rank}", str(workers.rank))) if workers is not None and own else data
    batches = ExampleBatches(use.examples(path), use.encoder, use.session.manifest.batch.size, seed)
    if workers is None or own or workers.mode == "queries":
        return batches
    from runtime_driver.fleet import Shard

    return Shard(batches, workers.rank, workers.size)


def _keep_last_good(session: Session, error: NonFiniteError, adapter_out: Path, journal: Path | None) -> str:
    """Write the last adapter with a finite loss; what became of it, for the user."""
    if error.last_good is None:
        return "No adapter was written: none had a finite loss."
    session.adapter = error.last_good
    session.save_adapter(adapter_out)
    again = "" if journal is None else f", and a new journal: {journal} would stop at the same step again"
    return (
        f"The last adapter with a finite loss, that after {error.good_steps} steps, is in {adapter_out}; "
        f"to go on from it, use --adapter {adapter_out}{again}."
    )
