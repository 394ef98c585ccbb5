"""`transform`: a model with LoRA adapters, or other trained parameters, becomes a training-step program."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mobizo_passes import manifest, pipelines
from mobizo_passes.batching import Batch, track_batch
from mobizo_passes.capture.confirm import confirm
from mobizo_passes.capture.export import capture
from mobizo_passes.capture.inputs import LossFn, name_inputs
from mobizo_passes.capture.modes import check_tensors, ordinary
from mobizo_passes.capture.wrapped import class_name, unwrap
from mobizo_passes.dialects import CAPTURED, READABLE
from mobizo_passes.errors import InputError, UnsupportedOp, VerificationFailed
from mobizo_passes.graph.facts import facts, role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.graph.passes import PassRecord, run_passes
from mobizo_passes.graph.text import to_text
from mobizo_passes.noise import KINDS
from mobizo_passes.passes.gather_labels import class_inputs, find_token_loss, ignored_label, label_counts
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.program import TrainingProgram
from mobizo_passes.sites import peft as peft_files
from mobizo_passes.sites.lora_site import is_up
from mobizo_passes.sites.select import (
    SiteChoice,
    Sites,
    check_dtypes,
    check_memory,
    factors_of,
)
from mobizo_passes.sites.trainable import Trainable, find_trained
from mobizo_passes.verify import verify
from mobizo_passes.zo.estimators import Estimator, Exact, TwoSided, check_estimator
from mobizo_passes.zo.optimizers import SGD, Optimizer, check_optimizer


@neutral()
def transform(
    model: nn.Module,
    example_inputs: Any,
    *,
    estimator: Estimator | None = None,
    optimizer: Optimizer | None = None,
    noise: str = "gaussian",
    trainable: Trainable = None,
    loss: LossFn | None = None,
    sites: SiteChoice = None,
    batch_dim: int = 0,
    max_labels: int | None = None,
) -> TrainingProgram:
    """Compile a model with an adapter into a training step: zeroth-order (paper, section 3), or exact.

    The process's default dtype and device, autocast, gradient, inference and deterministic modes and RNG state are set
    aside meanwhile: the program does not depend on them. Rotary embeddings whose frequencies change with the length
    (dynamic, longrope) are held at those of the example inputs; `history` then begins with ``freeze-rope``. Experts of
    transformers' models compute token by token while they are captured; it then has ``experts-by-token``. bitsandbytes'
    four-bit layers multiply by dequantized weights; it then has ``dequantize-weights``.

    Args:
        model: any `nn.Module` with LoRA, or with `trainable` parameters, in eval mode. It is not changed.
            `torch.compile`, `DataParallel` and `DistributedDataParallel` around it are taken off; the program's `notes`
            say so.
        example_inputs: tuple of args or dict of kwargs, labels included; the program is compiled for their shapes.
        estimator: `TwoSided(queries=q)` (default, q = 4), `OneSided(queries=q)`, or one of a class of your own (see
            `register_estimator`); with ``normalize="std"`` the projected gradients are divided by the standard
            deviation of the perturbed losses (FZOO). `ForwardGradient(queries=q)` differentiates the graph along the
            same directions instead: the same projected gradients without epsilon and its errors. `Exact()` gives the
            whole gradient: its step takes neither seed nor epsilon, and holds activations.
        optimizer: what makes a step of the gradient, estimated or exact: `SGD()` (default), `Momentum(beta=…)` or
            `AdamW(…)`, each with weight decay and a bound on the gradient's norm. Its state is an input and an output.
        noise: "gaussian" or "rademacher".
        trainable: "lora_B" (LoRA-FA: lora_A frozen), "lora_A+lora_B", "requires_grad" (all parameters that are marked
            so), a predicate on (FQN, parameter), or a list of FQNs. None: "lora_B" of the LoRA sites; in a model under
            PEFT without any, such as VeRA, IA³ or prompt tuning, what PEFT marks. These tensors must be float32.
        loss: None for the model's own loss output, else ``fn(outputs, *labels) -> Tensor``; the inputs that the model's
            forward does not name are its labels.
        sites: None to take every site found, or a predicate on `LoRASite`, or a list of module or parameter FQNs.
        batch_dim: the dimension of the inputs that holds the batch; inside the model it is followed from there.
        max_labels: how many labelled positions one example may carry in a token-level loss; None takes the most that
            the example inputs carry. Logits are computed at that many positions only.

    Raises:
        InputError: options or example inputs that don't fit the model.
        CaptureError: the model can't be exported, returns no loss, or changes its own state.
        NoLoRASites: no site was found or chosen, and no parameters were named.
        UnsupportedOp, BatchCoupled: a perturbed value reaches an operator that has no rule, or that mixes examples.
    """
    estimator = TwoSided() if estimator is None else estimator
    check_estimator(estimator)
    optimizer = SGD() if optimizer is None else optimizer
    check_optimizer(optimizer)
    if noise not in KINDS:
        raise InputError(f"noise must be one of {', '.join(KINDS)}; found {noise!r}")
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise InputError(f"batch_dim must be a non-negative int, found {batch_dim!r}")
    model, notes = unwrap(model)
    check_tensors(model)
    inputs = name_inputs(model, example_inputs, loss)
    inputs = replace(inputs, tensors=ordinary(inputs.tensors))
    captured, verifier = capture(model, inputs, loss)
    declared = [role(node).name for node in captured.placeholders("parameter")]
    history: list[PassRecord] = []
    for name, modules in captured.shims.items():
        if modules:
            text = to_text(captured)
            history.append(PassRecord(name, len(modules), text, text))
    run_passes(captured, pipelines.clean(keep_detached=not estimator.uses_epsilon), history, dialect=CAPTURED)
    training = find_trained(captured, model, trainable, sites, declared)
    found, fqns = training.sites, training.fqns
    check_dtypes(captured.state, fqns)
    adapter = {fqn: captured.state[fqn].clone() for fqn in fqns}
    check_memory(model, fqns)
    notes += _untrained(found, model)
    files = peft_files.adapter_files(model, fqns, factors_of(found, model))
    stored = peft_files.tensors_of(model, files)
    frozen = {fqn: value for fqn, value in stored.items() if fqn not in adapter}

    # Labels are counted per example along dimension 1; elsewhere the loss reads every position.
    limit = _label_limit(captured, inputs.tensors, max_labels) if batch_dim == 0 else None
    run_passes(captured, pipelines.lift(fqns), history, dialect=READABLE)
    methods: dict[str, Ir] = {}
    evaluated = only(captured, "loss")
    run_passes(evaluated, pipelines.evaluate(limit), history, dialect=READABLE)
    batch = batch_of(evaluated, batch_dim)
    ready, gradients = evaluated.clone(), None
    if isinstance(estimator, Exact):
        gradients = run_passes(ready, pipelines.gradients(estimator), history, dialect=READABLE).clone()
    passes = pipelines.step(estimator, noise, batch, batch_dim, optimizer)
    methods["step"] = run_passes(ready, passes, history, dialect=READABLE)
    if estimator.projected:
        methods["apply"] = _apply(captured, estimator, optimizer, noise)
    methods["loss"] = run_passes(evaluated, pipelines.parts(batch), dialect=READABLE)
    if any(spec.kind == "logits" for spec in captured.outputs):
        methods["logits"] = _logits(captured)
    if gradients is not None and isinstance(estimator, Exact) and estimator.gradients:
        methods["gradients"] = gradients
    confirm(methods["loss"], model, inputs, loss, batch, adapter)

    token = find_token_loss(captured)
    program = TrainingProgram(
        methods=methods,
        captured=captured,
        history=history,
        sites=found,
        gradients=gradients,
        estimator=estimator,
        optimizer=optimizer,
        noise=noise,
        trainable=training.kind,
        adapter=adapter,
        frozen=frozen,
        inputs=inputs,
        loss=loss,
        labels={
            "size": batch.size,
            "dims": {name: batch.places.get(name) for name in inputs.tensors},
            "logits_dim": _logits_dim(methods, batch),
            "inputs": list(inputs.tensors),
            "label_inputs": _label_inputs(methods, inputs.tensors),
            "class_inputs": class_inputs(captured),
            "max_labels": limit,
            "ignore_index": ignored_label(captured),
            "shift": token is not None and token.labels.op != "placeholder",
        },
        model={"name": class_name(model), "sha256": manifest.weights_sha256(captured.state)},
        files=files,
        notes=notes,
        verifier=verifier,
    )
    if captured.custom_backwards and not estimator.uses_epsilon:
        _check_backwards(program, model, example_inputs, captured.custom_backwards)
    return program


def _check_backwards(program: TrainingProgram, model: nn.Module, inputs: Any, functions: tuple[str, ...]) -> None:
    """Raise `UnsupportedOp` if a backward of the model's own gives another gradient than the forward does."""
    try:
        verify(program, model, inputs)
    except VerificationFailed as error:
        raise UnsupportedOp(
            f"the gradient is not that of autograd, which calls a backward of the model's own: {', '.join(functions)}\n"
            f"  {error}\n"
            "  what a backward adds can be written into the forward (a straight-through estimator is x + (f(x) - "
            "x).detach()); estimators by differences, as mz.TwoSided(), need no backward"
        ) from error


def _untrained(found: Sites, model: nn.Module) -> tuple[str, ...]:
    """Say which LoRA matrices are not trained although they could be: active, not frozen, and not left out."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    chosen = {s.lora_B for s in found.left_out}
    over = [r for r in found.rejected if r.read and is_up(r.name) and r.name in trainable and r.name not in chosen]
    if not over:
        return ()
    listed = "".join(f"\n  {r.name}: {r.reason}" for r in over[:4])
    more = f"\n  and {len(over) - 4} more, in program.sites.rejected" if len(over) > 4 else ""
    note = f"{len(over)} LoRA matrices are not trained; they stay as they are:{listed}{more}"
    warnings.warn(note, stacklevel=3)
    return (note,)


def only(ir: Ir, kind: str) -> Ir:
    """Return a copy that computes a single output."""
    copy = ir.clone()
    node = copy.output_node(kind)
    copy.set_outputs([(Output(kind, kind), node)])
    copy.eliminate_dead_code()
    copy.lint()
    return copy


def _logits(captured: Ir) -> Ir:
    """The logits method takes only the batch inputs that logits depend on."""
    ir = only(captured, "logits")
    for node in ir.placeholders("batch"):
        if not node.users:
            ir.graph.erase_node(node)
    ir.lint()
    return ir


def _apply(captured: Ir, estimator: Estimator, optimizer: Optimizer, noise: str) -> Ir:
    """The apply method starts from an empty program with the adapter and the projected gradients as inputs."""
    graph = torch.fx.Graph()
    graph.output(())
    ir = Ir(graph, {}, (), captured.fake)
    ir.pass_name = "apply"
    for node in captured.placeholders("adapter"):
        ir.add_input("adapter", role(node).name, node.meta["val"])
    ir.add_input("seed", "seed", torch.zeros(1, dtype=torch.int64))
    ir.add_input("lr", "lr", torch.zeros(1))
    ir.add_input("projected_gradients", "projected_gradients", torch.zeros(estimator.queries))
    return run_passes(ir, pipelines.apply(estimator, noise, optimizer), dialect=READABLE)


def _label_limit(captured: Ir, example: dict[str, torch.Tensor], wanted: int | None) -> int | None:
    counts = label_counts(captured, example)
    if counts is None:
        if wanted is not None:
            raise InputError(
                "max_labels= needs a token-level cross-entropy against integer labels; this loss is not one"
            )
        return None
    most = int(counts.max())
    if wanted is not None and wanted < most:
        raise InputError(f"max_labels is {wanted}, but an example input carries {most} labelled positions")
    return max(most, 1) if wanted is None else wanted


def _label_inputs(methods: dict[str, Ir], tensors: dict[str, torch.Tensor]) -> list[str]:
    if "logits" not in methods:
        return []
    needed = {role(n).name for n in methods["logits"].placeholders("batch")}
    used = {role(n).name for n in methods["loss"].placeholders("batch") if n.users}
    return [name for name in tensors if name in used and name not in needed]


def _logits_dim(methods: dict[str, Ir], batch: Batch) -> int | None:
    """The dimension of the logits that holds the batch; None if they hold it together with something else."""
    if "logits" not in methods:
        return None
    track_batch(methods["logits"], batch)
    node = methods["logits"].output_node("logits")
    place = facts(node).layout
    return place.dim if place is not None and node.meta["val"].shape[place.dim] == batch.size else None
