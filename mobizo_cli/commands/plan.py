"""`mobizo plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobizo_cli import options as opt
from mobizo_cli.errors import OptionError, needs, note

if TYPE_CHECKING:
    from torch import Tensor

    import mobizo_passes as mz
    from lowering.lowered import Lowered
    from mobizo_cli.build import Prepared
    from mobizo_cli.planning import Planned


def plan(
    model: opt.ModelArgument,
    template: opt.Template = "{text} It was",
    labels: opt.Labels = "0= terrible,1= great",
    label_column: opt.LabelColumn = "label",
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Examples to run a step on. [default: made-up ones]"),
    ] = None,
    loss: opt.LossOption = "label-words",
    max_length: opt.MaxLength = 32,
    rank: opt.Rank = None,
    alpha: opt.Alpha = None,
    target_modules: opt.TargetModules = None,
    layers: opt.Layers = None,
    trainable: opt.TrainableOption = None,
    batch: opt.BatchSize = 4,
    queries: opt.Queries = 4,
    optimizer: opt.OptimizerOption = "sgd",
    estimators: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Estimators to compare, comma-separated. [default: all]")
    ] = None,
    target: opt.TargetName = "xnnpack",
    precision: opt.Precision = None,
    max_memory: opt.MaxMemory = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Run a step of each. [default: where the runtime is at hand]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare what a training step takes with each estimator, and say which to choose. Compiles each: minutes."""
    with needs("executorch", "executorch"):
        import lowering
    from lowering.targets import get_target
    from mobizo_cli import planning
    from mobizo_cli.build import draft, prepare
    from mobizo_cli.commands.lower import target_options
    from mobizo_cli.data import load_examples

    most = planning.parse_bytes("--max-memory", max_memory)
    names = planning.estimator_names(estimators)
    chosen_target = get_target(target).configured(target_options(precision, None))
    chosen_target.require()
    if measure is None:
        measure = chosen_target.survey().runs
    settings = opt.BuildOptions(
        model=model,
        template=template,
        labels=labels,
        label_column=label_column,
        loss=loss,
        rank=rank,
        alpha=alpha,
        target_modules=target_modules,
        layers=layers,
        init_seed=0,
        trainable=trainable,
        max_length=max_length,
        batch=batch,
        queries=queries,
        estimator=names[0],
        noise="gaussian",
        normalize=None,
        optimizer=optimizer,
    )
    examples = None if data is None else load_examples(data, draft(settings))
    prepared = prepare(settings, "")
    batches = None if data is None or examples is None else prepared.batches(data, examples)

    def prepared_on(place: str | None) -> Prepared:
        return prepared if place == layers else prepare(replace(settings, layers=place), "")

    def lowered(program: mz.TrainingProgram) -> Lowered:
        return lowering.lower(program, target=target, precision=precision, check=False)

    def first_batch(each: Prepared) -> dict[str, Tensor]:
        return each.example_batch() if batches is None else batches.batch(0)

    places = planning.placements(settings, planning.layers_of(prepared))
    candidates = planning.candidates_of(names, places)
    planned: list[planning.Planned] = []
    for each in planning.plan(candidates, prepared_on, lowered, first_batch if measure else None):
        planned.append(each)
        note(f"{planning.title(each.candidate)}: {each.refused or 'compiled'}")
    chosen = planning.choose(planned, most)
    _show(planned, chosen, most, as_json)
    if chosen is None:
        raise OptionError(planning.nothing_fits(planned, most))


def _show(planned: Sequence[Planned], chosen: Planned | None, most: int | None, as_json: bool) -> None:
    from mobizo_cli.console import facts, table
    from mobizo_cli.planning import mebibytes, reason, title

    why = None if chosen is None else reason(chosen, planned, most)
    if as_json:
        place = None if chosen is None else planned.index(chosen)
        told = {"max_memory": most, "candidates": [each.to_dict() for each in planned], "chosen": place, "why": why}
        typer.echo(json.dumps(told, indent=1))
        return
    rows = []
    for each in planned:
        taken = each.footprint
        cells = ["-"] * 8
        if taken is not None:
            sizes = (taken.weight_bytes, taken.packed_bytes, taken.arena_bytes + taken.live_bytes)
            state = (taken.adapter_bytes, taken.optimizer_bytes, taken.peak_bytes)
            cells = [f"{taken.flops / 1e9:.3f}", *map(mebibytes, (*sizes, *state)), mebibytes(each.measured_peak_bytes)]
        seconds = "-" if each.seconds is None else f"{each.seconds:.3g}"
        rows.append(("→" if each is chosen else "", title(each.candidate), *cells, seconds, each.refused))
    columns = (
        "",
        "estimator",
        "GFLOP",
        "weights",
        "packed copies",
        "activations",
        "adapter",
        "optimizer",
        "peak, estimated",
    )
    table("One training step", (*columns, "peak, measured", "seconds", "refused"), rows)
    if why is not None:
        facts([("choose", why)])
