"""The one module that edits graph, signature and state together.

`Ir` is a functional ATen graph whose inputs and outputs carry their roles. Passes edit it; `to_exported_program`
turns it into a valid `torch.export.ExportedProgram`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.graph import CodeGen

from mobizo_passes.capture.modes import neutral
from mobizo_passes.errors import InputError
from mobizo_passes.graph.infer import infer
from mobizo_passes.zo.combination import Combination

_STATE_KINDS = {
    "parameter": InputKind.PARAMETER,
    "buffer": InputKind.BUFFER,
    "state": InputKind.BUFFER,
    "constant": InputKind.CONSTANT_TENSOR,
}


@dataclass(frozen=True)
class Input:
    """A placeholder's role: `kind` is parameter, buffer or constant (held by the program), state (held, and written
    anew at every run), or adapter, optimizer (its state), batch, seed, lr, eps or projected_gradients (inputs)."""

    kind: str
    name: str


@dataclass(frozen=True)
class Output:
    """An output's role: `kind` is loss | losses | projected_gradients | gradient | adapter | optimizer | logits |
    loss_sum, loss_weight and loss_scalar (parts of the loss, see `Combination`) | state (the new value of the state of
    that name)."""

    kind: str
    name: str


class Ir:
    """A graph under rewriting, with its state (FQN -> tensor) and the roles of its inputs and outputs."""

    def __init__(
        self, graph: fx.Graph, state: dict[str, Tensor], outputs: Sequence[Output], fake: FakeTensorMode
    ) -> None:
        self.module = fx.GraphModule(torch.nn.Module(), graph)
        self.state = state
        self.outputs = tuple(outputs)
        self.fake = fake
        # Name of the pass at work: stamped on every node that it creates.
        self.pass_name = "capture"
        # Modules whose rotary frequencies were held at the captured length.
        self.ropes: tuple[str, ...] = ()
        # How the outputs of a split loss combine over batches; None until the loss is split.
        self.combination: Combination | None = None
        self._stale = False

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def clone(self) -> Ir:
        """Return an independent copy that shares the tensors of the state."""
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = dict(node.meta)
            if node.op == "placeholder":
                # Of two placeholders one may have the other's target as its name: generated code would mix them up.
                values[node].target = values[node].name
        copy = Ir(graph, dict(self.state), self.outputs, self.fake)
        copy.combination = self.combination
        return copy

    # Reading -----------------------------------------------------------------------------------------------------

    def placeholders(self, *kinds: str) -> list[fx.Node]:
        """Return placeholders in order, all or those of the given kinds."""
        nodes = self.graph.find_nodes(op="placeholder")
        return [n for n in nodes if not kinds or n.meta["input"].kind in kinds]

    def input(self, kind: str, name: str) -> fx.Node:
        """Return the placeholder with this kind and name; raises `KeyError` if there is none."""
        for node in self.placeholders(kind):
            if node.meta["input"].name == name:
                return node
        raise KeyError((kind, name))

    def output_node(self, kind: str) -> fx.Node:
        """Return the node behind the first output of this kind; raises `KeyError` if there is none."""
        nodes: Any = self.graph.output_node().args[0]
        for spec, node in zip(self.outputs, nodes, strict=True):
            if spec.kind == kind:
                return node
        raise KeyError(kind)

    # Editing -----------------------------------------------------------------------------------------------------

    def add_input(self, kind: str, name: str, example: Tensor) -> fx.Node:
        """Add a placeholder after the existing ones; `example` gives its dtype and shape."""
        last = (self.placeholders() or [None])[-1]
        root = next(iter(self.graph.nodes))
        with self.graph.inserting_after(last) if last is not None else self.graph.inserting_before(root):
            node = self.graph.placeholder(identifier(name))
        node.meta["input"] = Input(kind, name)
        with self.fake:
            node.meta["val"] = torch.empty(tuple(example.shape), dtype=example.dtype)
        node.meta["pass"] = self.pass_name
        return node

    def add_constant(self, name: str, value: Tensor) -> fx.Node:
        """Add a constant to the state and return its placeholder; `name` is made unique and flat."""
        # A dotted name would nest below a parameter's FQN, where a module tree has no room for it.
        name = name.replace(".", "_")
        unique, count = name, 0
        while unique in self.state:
            count += 1
            unique = f"{name}_{count}"
        self.state[unique] = value.detach().contiguous()
        return self.add_input("constant", unique, value)

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Append a call at the current insertion point, with its value inferred; `like` lends its origin module."""
        # The operator's bare name: `%expand_3` reads better than fx's own `%expand_default_3`.
        schema = getattr(target, "_schema", None)
        name = None if schema is None else schema.name.rpartition("::")[2]
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        if like is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        node.meta["pass"] = self.pass_name
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Infer a node's value again from the values of its arguments."""
        node.meta["val"] = infer(self.fake, node.target, node.args, node.kwargs)

    def substitute(self, old: fx.Node, new: fx.Node, *, keep: Iterable[fx.Node] = ()) -> None:
        """Let every user of `old`, except those in `keep` and `new` itself, use `new`."""
        kept = {new, *keep}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)

    def set_outputs(self, outputs: Sequence[tuple[Output, fx.Node]]) -> None:
        """Replace all outputs."""
        self.outputs = tuple(spec for spec, _ in outputs)
        self.graph.output_node().args = (tuple(node for _, node in outputs),)

    def eliminate_dead_code(self) -> None:
        """Remove nodes without effect on an output, then state inputs that nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users:
                self.graph.erase_node(node)
        for node in self.placeholders(*_STATE_KINDS):
            if not node.users:
                self.state.pop(node.meta["input"].name, None)
                self.graph.erase_node(node)

    def lint(self) -> None:
        """Check the graph after edits; its code is generated when it is first run."""
        self.graph.lint()
        self._stale = True

    def _callable(self) -> fx.GraphModule:
        if self._stale:
            for node in self.placeholders():
                node.target = node.name
            self.module.recompile()
            self._stale = False
        return self.module

    # Running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate eagerly. `inputs` maps input names to tensors; returns output names to tensors.

        New values of state are among the results, and are what the next run starts from.
        Raises `InputError` if an input is missing or has another dtype or shape than the program was built for.
        """
        args = []
        for node in self.placeholders():
            spec: Input = node.meta["input"]
            if spec.kind in _STATE_KINDS:
                args.append(self.state[spec.name])
                continue
            if spec.name not in inputs:
                raise InputError(f"input '{spec.name}' is missing; got {', '.join(inputs) or 'nothing'}")
            args.append(_checked(spec, inputs[spec.name], node.meta["val"]))
        with torch.no_grad():
            results = self._callable()(*args)
        # The tensors themselves stay as they are: clones share them.
        self.state.update({s.name: v for s, v in zip(self.outputs, results, strict=True) if s.kind == "state"})
        return {spec.name: value for spec, value in zip(self.outputs, results, strict=True)}

    # Leaving -----------------------------------------------------------------------------------------------------

    @neutral()
    def to_exported_program(self, verifier: Any) -> torch.export.ExportedProgram:
        """Return a valid `ExportedProgram`: what it holds first, then user inputs in placeholder order.

        State is a mutated buffer of a copy that belongs to this `ExportedProgram` alone.
        """
        ir = self.clone()
        order = [n for kind in _STATE_KINDS for n in ir.placeholders(kind)]
        order += [n for n in ir.placeholders() if n not in set(order)]
        body = next(n for n in ir.graph.nodes if n.op != "placeholder")
        for node in order:
            body.prepend(node)
            # torch.export matches user inputs by target, everything else by name: they must be the same.
            node.target = node.name
        specs = [_input_spec(node) for node in order]
        ir.graph._codegen = CodeGen()
        nodes: Any = ir.graph.output_node().args[0]
        # torch.export wants mutations in front.
        returned = sorted(zip(ir.outputs, nodes, strict=True), key=lambda pair: pair[0].kind != "state")
        ir.set_outputs(returned)
        outputs = [_output_spec(spec, node) for spec, node in returned]
        for spec in ir.outputs:
            if spec.kind == "state":
                ir.state[spec.name] = ir.state[spec.name].clone()
        ir.lint()
        ir._callable()
        user = [n for n in order if n.meta["input"].kind not in _STATE_KINDS]
        return _exported(ir, user, ExportGraphSignature(specs, outputs), verifier)


def _exported(
    ir: Ir, user: list[fx.Node], signature: ExportGraphSignature, verifier: Any
) -> torch.export.ExportedProgram:
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.utils import _pytree as pytree

    examples = tuple(torch.zeros(tuple(n.meta["val"].shape), dtype=n.meta["val"].dtype) for n in user)
    in_spec = pytree.tree_structure((examples, {}))
    out_spec = pytree.tree_structure(tuple(o for o in ir.outputs if o.kind != "state"))
    # Like torch.export, leave the root's argument names out: later passes rename nodes.
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    in_state = [s for s in signature.input_specs if s.kind in (InputKind.PARAMETER, InputKind.BUFFER)]
    constants = {s.target: ir.state[s.target] for s in signature.input_specs if s.kind == InputKind.CONSTANT_TENSOR}  # type: ignore[index]
    return torch.export.ExportedProgram(
        root=ir.module,
        graph=ir.graph,
        graph_signature=signature,
        state_dict={s.target: ir.state[s.target] for s in in_state},  # type: ignore[index,misc]
        range_constraints={},
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        example_inputs=(examples, {}),
        constants=constants,  # type: ignore[arg-type]
        verifiers=[verifier],
    )


def _input_spec(node: fx.Node) -> InputSpec:
    spec: Input = node.meta["input"]
    kind = _STATE_KINDS.get(spec.kind, InputKind.USER_INPUT)
    target = spec.name if spec.kind in _STATE_KINDS else None
    return InputSpec(kind, TensorArgument(node.name), target, True if kind == InputKind.BUFFER else None)


def _output_spec(spec: Output, node: fx.Node) -> OutputSpec:
    if spec.kind == "state":
        return OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), spec.name)
    return OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)


def _checked(spec: Input, value: Any, expected: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"input '{spec.name}' must be a tensor, found {type(value).__name__}")
    if value.dtype != expected.dtype or value.shape != expected.shape:
        raise InputError(
            f"input '{spec.name}' must be {expected.dtype} {list(expected.shape)}, "
            f"found {value.dtype} {list(value.shape)}; the program is compiled for the shapes of its example inputs"
        )
    return value


def identifier(name: str) -> str:
    """Return a name as a legal node name, in lower case as torch.export itself writes input names.

    PEFT's wrapper stands in front of every name of its models and tells nothing: it is left out.
    """
    text = "".join(c if c.isalnum() else "_" for c in name.removeprefix("base_model.model.")).lower()
    return text if text[:1].isalpha() else f"x_{text}"
