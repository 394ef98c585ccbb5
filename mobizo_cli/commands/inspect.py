"""`mobizo inspect`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobizo_cli import options as opt
from mobizo_cli.errors import OptionError

if TYPE_CHECKING:
    import mobizo_passes as mz
    from runtime_driver.format import Manifest

_READING = "Reading"
Graph = Annotated[
    Path | None,
    typer.Option(
        help="Draw the step in this file: an .svg of modules, an .html to unfold, search and step through passes, or a "
        ".json for Google's Model Explorer.",
        rich_help_panel=_READING,
    ),
]
Explore = Annotated[
    bool,
    typer.Option(
        "--explore", help="Open the step in Google's Model Explorer (mobizo[explore]).", rich_help_panel=_READING
    ),
]
Diff = Annotated[
    str | None, typer.Option(metavar="PASS", help="Show what this pass changed, instead.", rich_help_panel=_READING)
]
Everything = Annotated[
    bool,
    typer.Option("--everything", help="With --diff: every repeated layer too.", rich_help_panel=_READING),
]

AsText = Annotated[
    bool,
    typer.Option(
        "--text",
        help="Print the step as text, below each line of the model what became of it.",
        rich_help_panel=_READING,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of tables, with every node.", rich_help_panel=_READING)
]


def inspect(
    model: opt.ModelArgument,
    template: opt.Template = "{text} It was",
    labels: opt.Labels = "0= terrible,1= great",
    loss: opt.LossOption = "label-words",
    max_length: opt.MaxLength = 32,
    rank: opt.Rank = None,
    alpha: opt.Alpha = None,
    target_modules: opt.TargetModules = None,
    layers: opt.Layers = None,
    trainable: opt.TrainableOption = None,
    batch: opt.BatchSize = 4,
    queries: opt.Queries = 4,
    estimator: opt.EstimatorOption = "two-sided",
    noise: opt.NoiseOption = "gaussian",
    normalize: opt.NormalizeOption = None,
    new_weights: opt.NewWeights = None,
    unused_weights: opt.UnusedWeights = None,
    graph: Graph = None,
    explore: Explore = False,
    diff: Diff = None,
    everything: Everything = False,
    as_text: AsText = False,
    as_json: AsJson = False,
    verify: opt.Verify = True,
) -> None:
    """Show what the compiler does to a model, or, for a .pte, what is in its manifest."""
    if everything and diff is None:
        raise OptionError("--everything belongs to --diff PASS.")
    if as_json + as_text + (diff is not None) > 1:
        raise OptionError("--json and --text show the program, --diff what a pass changed: take one of them.")
    if Path(model).suffix == ".pte":
        if graph is not None or explore or diff is not None or as_text:
            raise OptionError(f"--graph, --explore, --diff and --text need a model: {model} holds lowered graphs only.")
        _show_manifest(Path(model), verify, as_json)
        return
    if explore:
        from mobizo_cli import model_explorer

        model_explorer.check()
    if graph is not None:
        from mobizo_passes.views.drawing import check_path

        # Before a model is loaded and compiled.
        check_path(graph)
        if graph.is_dir() or not graph.parent.is_dir():
            problem = "is a directory" if graph.is_dir() else f"the directory {graph.parent} does not exist"
            raise OptionError(f"--graph {graph}: {problem}.")
    from mobizo_cli.build import prepare

    settings = opt.BuildOptions(
        model=model,
        template=template,
        labels=labels,
        label_column="label",
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
        estimator=estimator,
        noise=noise,
        normalize=normalize,
        new_weights=new_weights,
        unused_weights=unused_weights,
    )
    program = prepare(settings, "").transform()
    if diff is not None:
        from mobizo_cli import console

        console.diff(program.diff(diff, width=console.terminal_width(), everything=everything))
    elif as_json:
        typer.echo(json.dumps(_program(program), indent=1))
    elif as_text:
        typer.echo(program.text(sources=True), nl=False)
    else:
        _show_program(program)
    if graph is not None:
        program.draw(graph)
        typer.echo(f"{graph} written", err=True)
    if explore:
        from mobizo_cli import model_explorer

        model_explorer.show(program)


def _program(program: mz.TrainingProgram) -> dict[str, Any]:
    """Return what the tables show, and every node of the step, as plain values."""
    flops, estimator, graph = program.flops, program.estimator, program.to_networkx()
    return {
        "model": program.model,
        "estimator": {"name": str(estimator), **estimator.manifest(), "groups": estimator.groups},
        "optimizer": dict(program.optimizer.manifest()),
        "sites": [asdict(site) for site in program.sites],
        "not_taken": [{"name": each.name, "reason": each.reason} for each in program.sites.rejected],
        "passes": [{"name": record.name, "rewrites": record.rewrites} for record in program.history],
        "flops": {"once": flops.shared, "per_group": flops.expanded, "share_computed_once": flops.share_computed_once},
        "methods": list(program.methods),
        "notes": list(program.notes),
        "nodes": [
            {"name": name, **graph.nodes[name], "inputs": list(graph.predecessors(name))} for name in graph.nodes
        ],
    }


def _show_program(program: mz.TrainingProgram) -> None:
    from mobizo_cli.console import facts, table

    table(
        f"{len(program.sites)} LoRA sites",
        ("site", "kind", "rank", "scaling", "in", "out"),
        [(s.name, s.kind, s.rank, s.scaling, s.in_features, s.out_features) for s in program.sites],
    )
    if program.sites.rejected:
        table("Not taken", ("candidate", "reason"), [(r.name, r.reason) for r in program.sites.rejected])
    table("Passes", ("pass", "rewrites"), [(record.name, record.rewrites) for record in program.history])
    flops, estimator = program.flops, program.estimator
    computed_once = ("computed once", f"{flops.share_computed_once:.1%} of a forward")
    if estimator.projected and not estimator.uses_epsilon:
        tangent = flops.expanded / flops.groups / 1e9
        computed_once = (
            "of these",
            f"{flops.shared / 1e9:.3f} for the values, {tangent:.3f} for each query's tangents",
        )
    facts(
        [
            ("estimator", f"{estimator}, {estimator.groups} groups"),
            ("GFLOP in one step", f"{flops.total / 1e9:.3f}"),
            computed_once,
        ]
    )


def _show_manifest(path: Path, verify: bool, as_json: bool) -> None:
    from mobizo_cli.console import facts, table
    from runtime_driver.program import LoadedProgram

    manifest = LoadedProgram(path, verify=verify).manifest
    if as_json:
        typer.echo(manifest.model_dump_json(indent=1))
        return
    estimator, batch = manifest.estimator, manifest.batch
    values = sum(math.prod(tensor.shape) for tensor in manifest.trainable_adapter)
    facts(
        [
            ("model", manifest.model.name),
            ("target", ", ".join([manifest.target, *(f"{key}={value}" for key, value in manifest.options.items())])),
            ("program id", manifest.program_id),
            ("estimator", f"{estimator.kind}, {estimator.queries} queries, {estimator.groups} groups"),
            ("normalized by", estimator.normalize or "nothing"),
            ("optimizer", _optimizer(manifest)),
            ("noise", f"{manifest.noise.kind}, version {manifest.noise.version}"),
            ("trained", f"{manifest.trainable}: {len(manifest.trainable_adapter)} tensors, {values:,} values"),
            ("adapter in step", manifest.adapter_state),
            ("weights", _weights(manifest)),
            ("batch", f"{batch.size} examples of {', '.join(batch.inputs)}"),
            ("labels", "any number" if batch.max_labels is None else f"at most {batch.max_labels} for each example"),
            ("written by", ", ".join([f"mobizo {manifest.mobizo_version}", *_versions(manifest.tool_versions)])),
            *((f"task: {name}", value) for name, value in manifest.application.items()),
        ]
    )
    rows = []
    for name, method in manifest.methods.items():
        for side, items in (("in", method.inputs), ("out", method.outputs)):
            shown = [item for item in items if item.role not in ("adapter", "optimizer", "gradient")]
            for role in ("adapter", "optimizer", "gradient"):
                count = sum(item.role == role for item in items)
                if count:
                    rows.append((name, side, f"{role}: {count} tensors", ""))
            rows.extend((name, side, item.name, f"{item.dtype}{list(item.shape)}") for item in shown)
    table("Methods", ("method", "", "tensor", "type"), rows)


def _optimizer(manifest: Manifest) -> str:
    spec = manifest.optimizer
    return "sgd" if spec is None else ", ".join([spec.kind, *(f"{k}={v}" for k, v in spec.options.items())])


def _versions(tools: dict[str, str]) -> list[str]:
    return [f"{name} {version}" for name, version in tools.items()]


def _weights(manifest: Manifest) -> str:
    spec = manifest.weights_file
    if spec is None:
        return "inside"
    return f"{spec.file or 'the .ptd of the same name'}, {spec.bytes / 2**20:.1f} MiB, SHA-256 {spec.sha256}"
