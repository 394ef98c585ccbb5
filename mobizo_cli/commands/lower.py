"""`mobizo lower`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mobizo_cli import options as opt
from mobizo_cli.errors import OptionError, needs, note

if TYPE_CHECKING:
    from torch import Tensor

    import mobizo_passes as mz
    from lowering.lowered import Lowered


def lower(
    model: opt.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .pte to write.")],
    template: opt.Template,
    labels: opt.Labels,
    label_column: opt.LabelColumn = "label",
    loss: opt.LossOption = "label-words",
    max_length: opt.MaxLength = 32,
    rank: opt.Rank = None,
    alpha: opt.Alpha = None,
    target_modules: opt.TargetModules = None,
    layers: opt.Layers = None,
    init_seed: opt.InitSeed = 0,
    trainable: opt.TrainableOption = None,
    batch: opt.BatchSize = 4,
    queries: opt.Queries = 4,
    estimator: opt.EstimatorOrAutoOption = "two-sided",
    checkpoint: opt.CheckpointOption = None,
    max_memory: opt.MaxMemory = None,
    optimizer: opt.OptimizerOption = "sgd",
    weight_decay: opt.WeightDecay = None,
    clip_norm: opt.ClipNorm = None,
    noise: opt.NoiseOption = "gaussian",
    normalize: opt.NormalizeOption = None,
    new_weights: opt.NewWeights = None,
    unused_weights: opt.UnusedWeights = None,
    target: opt.TargetName = "xnnpack",
    precision: opt.Precision = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the target's own, see `mobizo targets`; may be given more than once.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Examples on which a quantized program's ranges are measured."),
    ] = None,
    calibration_batches: Annotated[int, typer.Option(min=1, max=4096, help="How many batches of them.")] = 8,
    measure: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Examples on which gradients are compared with float32."),
    ] = None,
    measure_batches: Annotated[int, typer.Option(min=1, max=4096, help="How many batches of them.")] = 2,
    adapter: Annotated[
        Literal["external", "internal"],
        typer.Option(help="The step's adapter: an input and an output, or held inside the program."),
    ] = "external",
    external_weights: Annotated[
        bool, typer.Option("--external-weights", help="Put the model's weights into a .ptd of their own.")
    ] = False,
    weights_file: Annotated[
        Path | None,
        typer.Option(help="Leave out the weights that are in this .ptd of another program of the same model."),
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Run the program once beside its eager form. [default: where its runtime is at hand]",
            show_default=False,
        ),
    ] = None,
    etrecord: Annotated[
        Path | None,
        typer.Option(help="Also write an ETRecord of the step to this file, for ExecuTorch's Inspector."),
    ] = None,
) -> None:
    """Compile a model with LoRA into a .pte that trains itself, with its tokenizer in a directory beside it."""
    if output.suffix != ".pte":
        raise OptionError(f"--output {output}: expected a name that ends in .pte.")
    if not output.parent.is_dir():
        raise OptionError(f"--output {output}: the directory {output.parent} does not exist.")
    if etrecord is not None and (etrecord.is_dir() or not etrecord.parent.is_dir()):
        raise OptionError(f"--etrecord {etrecord}: expected a file in a directory that exists.")
    with needs("executorch", "executorch"):
        import lowering
    options = target_options(precision, option)
    _check_target(target, options, calibrate, external_weights or weights_file is not None)
    if weights_file is not None:
        from lowering.weights_file import check_weights_file

        check_weights_file(weights_file)
    from lowering.saving import check_output, staging
    from mobizo_cli import planning, tokenizer_files
    from mobizo_cli.build import draft, prepare
    from mobizo_cli.console import facts, table
    from mobizo_cli.data import load_examples

    most = planning.parse_bytes("--max-memory", max_memory)
    automatic = estimator == planning.AUTO
    if most is not None and not automatic:
        raise OptionError(
            f"--max-memory {max_memory} belongs to --estimator auto; `mobizo plan` compares all estimators."
        )
    if automatic and normalize is not None:
        raise OptionError(f"--normalize {normalize} belongs to some estimators only: name one, rather than auto.")
    if automatic and checkpoint is not None:
        raise OptionError(f"--checkpoint {checkpoint}: with --estimator auto it is a part of the choice; leave it out.")
    place = output.with_suffix(".tokenizer")
    check_output(output, external_weights and weights_file is None)
    tokenizer_files.check_place(place)

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
        init_seed=init_seed,
        trainable=trainable,
        max_length=max_length,
        batch=batch,
        queries=queries,
        estimator=planning.estimator_names()[0] if automatic else estimator,
        noise=noise,
        normalize=normalize,
        new_weights=new_weights,
        unused_weights=unused_weights,
        optimizer=optimizer,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        checkpoint=checkpoint,
    )
    task = draft(settings)
    given = {path: load_examples(path, task) for path in (calibrate, measure) if path is not None}
    with staging(output) as aside:
        prepared = prepare(settings, place.name, aside / "tokenizer")
        batches = {path: prepared.batches(path, examples) for path, examples in given.items()}

        def first(path: Path | None, count: int) -> list[dict[str, Tensor]] | None:
            return None if path is None else [batches[path].batch(step) for step in range(count)]

        calibration, measured_on = first(calibrate, calibration_batches), first(measure, measure_batches)

        def compiled(program: mz.TrainingProgram) -> Lowered:
            return lowering.lower(
                program,
                target=target,
                adapter=adapter,
                calibration=calibration,
                application=prepared.task.application(),
                external_weights=external_weights,
                weights_file=weights_file,
                check=check,
                measure=measured_on,
                etrecord=etrecord is not None,
                **options,
            )

        why = ""
        if automatic:
            lowered, why = planning.first_that_fits(prepared, compiled, most)
        else:
            lowered = compiled(prepared.transform())
        with tokenizer_files.placed(aside / "tokenizer", place, aside):
            lowered.save(output)
        if etrecord is not None:
            lowered.save_etrecord(etrecord)
    methods = lowered.report.methods.items()
    table(
        "Methods",
        ("method", "delegate calls", "nodes delegated", "nodes not", "FLOPs delegated"),
        [
            (name, each.partitions, each.delegated_nodes, len(each.portable), f"{each.delegated_share:.1%}")
            for name, each in methods
        ],
    )
    rows: list[tuple[str, object]] = [("program", output), ("size", f"{output.stat().st_size / 2**20:.1f} MiB")]
    if lowered.manifest.weights_file is not None:
        spec = lowered.manifest.weights_file
        rows += [("weights", spec.file or output.with_suffix(".ptd")), ("size", f"{spec.bytes / 2**20:.1f} MiB")]
    facts([*rows, ("target", target), *([("estimator", why)] if why else [])])
    found = lowered.report.fidelity
    if found is not None:
        facts([("beside float32", found.summary)])
        if found.warning:
            note(f"warning: {found.warning}")


def target_options(precision: str | None, given: list[str] | None) -> dict[str, str]:
    """`--precision` and the values of `--option`, by name.

    Raises:
        OptionError: one is not KEY=VALUE, or a key is given twice.
    """
    options = {} if precision is None else {"precision": precision}
    for each in given or ():
        key, separator, value = each.partition("=")
        if not separator or not key.isidentifier():
            raise OptionError(f"--option {each!r}: expected KEY=VALUE; `mobizo targets` lists the keys and values.")
        if key in options:
            raise OptionError(f"--option {each}: {key!r} is given already, as {options[key]!r}; give it once.")
        options[key] = value
    return options


def _check_target(target: str, options: dict[str, str], calibrate: Path | None, external_weights: bool) -> None:
    """Before minutes of compiling, not after."""
    from lowering.targets import get_target, require_external_weights

    chosen = get_target(target).configured(options)
    if chosen.quantizes and calibrate is None:
        raise OptionError(f"--precision {chosen.precision} needs --calibrate FILE, examples to measure ranges on.")
    if calibrate is not None and not chosen.quantizes:
        raise OptionError(f"--calibrate {calibrate}: this program is not quantized; leave it out.")
    chosen.require()
    if external_weights:
        require_external_weights(chosen)
