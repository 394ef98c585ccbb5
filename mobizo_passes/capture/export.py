"""Capture: `torch.export` of the model together with its loss, as an `Ir` with outputs loss and (if any) logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.distributions import Distribution
from torch.export.graph_signature import InputKind, OutputKind

from mobizo_passes.batching import RULES
from mobizo_passes.capture.experts import experts_by_token
from mobizo_passes.capture.explain import data_dependent, explain
from mobizo_passes.capture.functional import CutGradients, decompose_composites, functional
from mobizo_passes.capture.inputs import Inputs, LossFn
from mobizo_passes.capture.known import check_modules
from mobizo_passes.capture.layouts import forget_layouts, plain_state
from mobizo_passes.capture.quantized import dequantized
from mobizo_passes.capture.rope import frozen_rope
from mobizo_passes.errors import CaptureError, describe
from mobizo_passes.graph.dialect import draws
from mobizo_passes.graph.facts import note
from mobizo_passes.graph.inline import WritesInPlace, take_apart
from mobizo_passes.graph.ir import Input, Ir, Output
from mobizo_passes.graph.nodes import identifier

aten = torch.ops.aten

_KINDS = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
# Composites that canonicalization removes, though no rule covers them.
_KEPT = (aten.dropout.default, aten.broadcast_tensors.default, aten.type_as.default)
# Loops over time, which are written out where the adapter reaches them.
_RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


class _WithLoss(nn.Module):
    """Calls the model and its loss; returns (loss, logits or None)."""

    def __init__(self, model: nn.Module, inputs: Inputs, loss: LossFn | None) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs
        self._loss = loss

    def forward(self, **batch: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor]:
        out = forward_with_loss(self.model, self._inputs, self._loss, batch)
        value = out[0].mean() if out[0].dim() else out[0]
        return (value, out[1]) if len(out) == 2 else (value,)


def forward_with_loss(
    model: Any, inputs: Inputs, loss: LossFn | None, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor] | tuple[Tensor]:
    """Run the model on a named batch; returns (loss, logits), or (loss,) if the model gives no logits.

    Raises `CaptureError` if there is no loss to be found in the outputs.
    """
    args = [batch[n] if n in batch else inputs.constants[n] for n in inputs.positional]
    given = {**{k: v for k, v in batch.items() if k not in inputs.loss_only}, **inputs.constants}
    out = model(*args, **{k: v for k, v in given.items() if k not in inputs.positional})
    if loss is not None:
        value, logits = loss(out, *(batch[n] for n in inputs.loss_only)), _logits(out)
    else:
        value, logits = _own_loss(out)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() > 1:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CaptureError(
            f"the loss must be one floating-point scalar, or one value per example; found {found}\n"
            "  pass labels so that the model returns its own loss, or pass loss=fn(outputs, *labels)"
        )
    return (value,) if logits is None else (value, logits)


def _field(out: Any, name: str) -> Any:
    return out.get(name) if isinstance(out, dict) else getattr(out, name, None)


def _logits(out: Any) -> Tensor | None:
    if isinstance(out, Tensor):
        return out
    found = _field(out, "logits")
    if found is None and isinstance(out, tuple | list):
        found = next((v for v in out if isinstance(v, Tensor)), None)
    return found if isinstance(found, Tensor) else None


def _own_loss(out: Any) -> tuple[Any, Tensor | None]:
    if isinstance(out, Tensor) and out.dim() == 1:
        raise CaptureError(
            f"the model returns one number per example, {list(out.shape)}, and no loss= says what to make of it\n"
            "  if these are predictions, pass loss=fn(outputs, *labels); if they are losses, loss=lambda losses: losses"
        )
    if isinstance(out, Tensor):
        return out, None
    found = _field(out, "loss")
    if found is not None:
        return found, _logits(out)
    if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor) and out[0].dim() == 0:
        return out[0], next((v for v in out[1:] if isinstance(v, Tensor)), None)
    return None, None


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """For the time of the export, freeze all parameters and switch off Hugging Face's key-value cache and the checks
    of `torch.distributions`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Inside a user's own module too.
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None)]
    checked = Distribution._validate_args
    for p in trainable:
        p.requires_grad_(False)
    for config in cached:
        config.use_cache = False
    # Its checks read values.
    Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad():
            yield
    finally:
        Distribution.set_default_validate_args(checked)
        for p in trainable:
            p.requires_grad_(True)
        for config in cached:
            config.use_cache = True


def capture(model: nn.Module, inputs: Inputs, loss: LossFn | None) -> tuple[Ir, Any]:
    """Export model and loss; returns the `Ir` and the export's verifier.

    Raises `CaptureError` if the export fails, the model changes its own state, or draws random numbers.
    """
    check_modules(model)
    wrapper = _WithLoss(model, inputs, loss)
    wrapper.training = model.training
    # Copies: one tensor given as two inputs (labels=input_ids) would be exported as one.
    examples = {name: value.clone() for name, value in inputs.tensors.items()}

    def run() -> None:
        forward_with_loss(model, inputs, loss, examples)

    with (
        _frozen(model),
        experts_by_token(model) as experts,
        frozen_rope(model, run) as ropes,
        dequantized(model) as layers,
        plain_state(model),
    ):
        try:
            # With gradients on, so that the parts of the model that switch them off show in the graph.
            with CutGradients() as cuts, cuts.watching_functions(), torch.enable_grad():
                exported = torch.export.export(wrapper, (), examples)
            exported, verifier = functional(exported)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises many unrelated types; all of them are about the user's model.
            raise CaptureError(explain(error, type(model).__name__)) from error
        ir = _to_ir(exported, model)
    ir.custom_backwards = tuple(cuts.functions)
    ir.shims = {"freeze-rope": tuple(ropes), "experts-by-token": tuple(experts), "dequantize-weights": tuple(layers)}
    _trace_to_loss(ir, loss)
    _take_apart(ir)
    forget_layouts(ir)
    return ir, verifier


def _to_ir(exported: torch.export.ExportedProgram, model: nn.Module) -> Ir:
    signature = exported.graph_signature
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    state: dict[str, Tensor] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    for node in exported.graph.nodes:
        copied = values[node] = graph.node_copy(node, values.__getitem__)
        copied.meta = {k: node.meta[k] for k in ("val", "stack_trace") if k in node.meta}
        if "nn_module_stack" in node.meta:
            copied.meta["nn_module_stack"] = {
                k: (_strip(fqn), cls) for k, (fqn, cls) in node.meta["nn_module_stack"].items() if _strip(fqn)
            }
        note(copied, made_by="capture")
        if node.op == "placeholder":
            spec = specs[node.name]
            kind = _KINDS.get(spec.kind, "batch")
            if kind == "batch":
                note(copied, role=Input(kind, node.name))
                continue
            assert spec.target is not None  # torch.export's own invariant for state inputs
            name = _strip(spec.target)
            note(copied, role=Input(kind, name))
            copied._rename(identifier(name))
            source = exported.constants if spec.target in exported.constants else exported.state_dict
            held: Any = source[spec.target]
            value = held.detach()
            # One object per FQN for all methods: that is how lowering stores each weight once.
            state[name] = nn.Parameter(value, requires_grad=False) if kind == "parameter" else value
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            name = _strip(spec.target or spec.arg.name)
            advice = "as BatchNorm in training mode does; call model.eval()"
            if not _trains(model):
                writer = next((values[n] for n in exported.graph.nodes if n.name == spec.arg.name), None)
                place = "" if writer is None or writer.op == "placeholder" else f": {describe(writer)}"
                advice = f"though it is in eval mode{place}\n  compute the value without writing it to a buffer"
                if any(getattr(getattr(m, "config", None), "rescale_every", 0) for m in model.modules()):
                    advice = f"though it is in eval mode{place}\n  set model.config.rescale_every = 0"
            raise CaptureError(
                f"the model changes its own state '{name}' during forward ({spec.kind.name.lower()}), {advice}"
            )
    _forget_assertions(graph)
    _check_sizes(graph)
    _check_operators(graph)
    outputs = [Output("loss", "loss"), Output("logits", "logits")][: len(signature.user_outputs)]
    values_of = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    fake = detect_fake_mode(values_of)
    if fake is None:
        raise CaptureError("the exported graph carries no shapes")
    ir = Ir(graph, state, outputs, fake)
    _check_random(ir, model)
    decompose_composites(ir)
    _check_random(ir, model)
    return ir


def _trace_to_loss(ir: Ir, loss: LossFn | None) -> None:
    """Let nodes of the user's loss function name that function as their source: export records modules only."""
    code: Any = getattr(loss, "__code__", None)
    for node in ir.graph.nodes:
        trace = node.meta.get("stack_trace", "").strip().splitlines()
        last = [line for line in trace if line.strip().startswith("File ")][-1:]
        if last and __file__ in last[0]:
            node.meta.pop("stack_trace")
            if code is not None:
                node.meta["stack_trace"] = f'File "{code.co_filename}", line {code.co_firstlineno}, in {code.co_name}'


def _take_apart(ir: Ir) -> None:
    """Replace composite operators without a rule (einsum, movedim, cosine_similarity, ...) by what they consist of."""
    for node in list(ir.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target in RULES or target in (*_KEPT, *_RECURRENT):
            continue
        pointwise = torch.Tag.pointwise in target.tags
        if pointwise or not target._can_decompose() or not isinstance(node.meta["val"], Tensor | tuple):
            continue
        # Left whole where it must write: if a perturbed value reaches it, it is refused by its own name.
        with contextlib.suppress(WritesInPlace):
            take_apart(ir, node)


def _check_random(ir: Ir, model: nn.Module) -> None:
    """Dropout with training off is the identity; everything else that draws random numbers is refused."""
    node = next((node for node in ir.graph.nodes if draws(node)), None)
    if node is None:
        return
    advice = "call model.eval() before transform"
    if not _trains(model):
        advice = (
            "the model is in eval mode, but draws all the same: F.dropout needs training=self.training; "
            "noise or sampling must be left out, or passed as an input"
        )
    raise CaptureError(
        f"the model draws random numbers, so its perturbed copies would see different dropout: {describe(node)}\n"
        f"  {advice}"
    )


def _trains(model: nn.Module) -> bool:
    return any(module.training for module in model.modules())


def _check_operators(graph: fx.Graph) -> None:
    """Refuse what is no operator: graphs inside the graph, such as the sides of `torch.cond`."""
    for node in graph.find_nodes(op="get_attr"):
        user = next(iter(node.users), node)
        raise CaptureError(
            f"a part of the model was exported as a graph of its own: {describe(user)}\n"
            "  write it without higher-order operators: for torch.cond, compute both sides and choose with torch.where"
        )


def _forget_assertions(graph: fx.Graph) -> None:
    """Drop assertions on values of tensors, and the numbers that nothing but an assertion reads."""
    checks = (aten._assert_scalar.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default)
    for node in reversed(list(graph.nodes)):
        value = node.meta.get("val")
        number = isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
        if node.op == "call_function" and not node.users and (node.target in checks or number):
            graph.erase_node(node)


def _check_sizes(graph: fx.Graph) -> None:
    """Refuse numbers and sizes that depend on values: everything after capture stands on fixed ones."""
    for node in graph.nodes:
        value = node.meta.get("val")
        values = value if isinstance(value, tuple | list) else [value]
        for one in values:
            sizes = one.shape if isinstance(one, Tensor) else [one]
            if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
                raise CaptureError(data_dependent(node))


def _strip(fqn: str) -> str:
    """Drop the capture wrapper's own prefix from an FQN."""
    return fqn.removeprefix("model").removeprefix(".")
