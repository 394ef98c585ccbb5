"""The one module that edits graph, signature and state together.

`Ir` is a functional ATen graph whose inputs and outputs carry their roles. Passes edit it, those of the compiler and
those of every target; `from_exported_program` and `to_exported_program` lead from and to torch's own form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from mobizo_passes.errors import InputError
from mobizo_passes.graph.facts import Input, come_from, note, role, succeed
from mobizo_passes.graph.infer import infer
from mobizo_passes.graph.neutral import neutral
from mobizo_passes.graph.nodes import identifier, shape_of, val
from mobizo_passes.graph.operators import writes

_STATE_KINDS = {
    "parameter": InputKind.PARAMETER,
    "buffer": InputKind.BUFFER,
    "state": InputKind.BUFFER,
    "constant": InputKind.CONSTANT_TENSOR,
}
# Held by the program and never written.
CONSTANT_KINDS = ("parameter", "buffer", "constant")


@dataclass(frozen=True)
class Output:
    """An output's role: `kind` is loss | losses | projected_gradients | gradient | adapter | optimizer | logits |
    loss_sum, loss_weight and loss_scalar (parts of the loss, see `Combination`) | state (the new value of the state of
    that name) | output and input (a result, and the new value of an input, of a program that comes from elsewhere)."""

    kind: str
    name: str


class Ir:
    """A graph under rewriting, with its state (FQN -> tensor) and the roles of its inputs and outputs."""

    def __init__(
        self, graph: fx.Graph, state: dict[str, Tensor], outputs: Sequence[Output], fake: FakeTensorMode
    ) -> None:
        self.graph = graph
        self.state = state
        self.outputs = tuple(outputs)
        self.fake = fake
        # Name of the pass at work: stamped on every node that it creates.
        self.pass_name = "capture"
        # Modules that were made to compute otherwise while they were captured, by what was done to them.
        self.shims: dict[str, tuple[str, ...]] = {}
        # Functions of the model with a backward of their own, which the graph does not have.
        self.custom_backwards: tuple[str, ...] = ()
        # How the outputs of a split loss combine over batches (a `Combination`); None until the loss is split.
        self.combination: Any = None
        # What new constants are: a program for ExecuTorch has buffers, see `from_exported_program`.
        self._constants = "constant"
        self._shared: dict[Any, fx.Node] = {}
        # The node before which `before` inserts; it lends new nodes their origin.
        self._anchor: fx.Node | None = None
        # The program that this one was read from: what surrounds the graph stays as it is there.
        self._source: torch.export.ExportedProgram | None = None
        self._module: fx.GraphModule | None = None
        self._ran = False

    def clone(self) -> Ir:
        """Return an independent copy that shares the tensors of the state."""
        copy = Ir(_copied(self.graph)[0], dict(self.state), self.outputs, self.fake)
        copy.combination, copy._constants, copy._source = self.combination, self._constants, self._source
        return copy

    @classmethod
    def from_exported_program(cls, program: torch.export.ExportedProgram) -> Ir:
        """Read a program, which stays as it is: the tensors are shared, never copied.

        New constants are buffers: ExecuTorch fails to copy a constant tensor into a second partition.
        """
        signature = program.graph_signature
        graph, copies = _copied(program.graph)
        written = set(signature.buffers_to_mutate.values())
        held = {**program.constants, **program.state_dict}
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        kinds = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer", InputKind.CONSTANT_TENSOR: "constant"}
        state: dict[str, Any] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            spec = specs[node.name]
            kind = "state" if spec.target in written else kinds.get(spec.kind, "input")
            name = node.name if spec.target is None or kind == "input" else spec.target
            note(copies[node], role=Input(kind, name))
            if kind in _STATE_KINDS:
                state[name] = held[name]
        outputs = [Output(_OUTPUTS.get(spec.kind, "output"), spec.target or "") for spec in signature.output_specs]
        fakes = (getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes)
        ir = cls(graph, state, outputs, next((fake for fake in fakes if fake is not None), FakeTensorMode()))
        ir._source, ir._constants = program, "buffer"
        return ir

    # Reading -----------------------------------------------------------------------------------------------------

    def placeholders(self, *kinds: str) -> list[fx.Node]:
        """Return placeholders in order, all or those of the given kinds."""
        nodes = self.graph.find_nodes(op="placeholder")
        return [n for n in nodes if not kinds or role(n).kind in kinds]

    def input(self, kind: str, name: str) -> fx.Node:
        """Return the placeholder with this kind and name; raises `KeyError` if there is none."""
        for node in self.placeholders(kind):
            if role(node).name == name:
                return node
        raise KeyError((kind, name))

    def find(self, *targets: Any) -> list[fx.Node]:
        """Return the calls of one of `targets`, in order (a snapshot: safe to edit while iterating)."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def reached(self, starts: Iterable[fx.Node]) -> set[fx.Node]:
        """Return `starts` and every node that one of them flows into."""
        found = set(starts)
        for node in self.graph.nodes:
            if any(each in found for each in node.all_input_nodes):
                found.add(node)
        return found

    def is_constant(self, node: fx.Node) -> bool:
        """Return whether a node is a placeholder of a tensor that the program holds and never writes."""
        return node.op == "placeholder" and role(node).kind in CONSTANT_KINDS

    def constant_value(self, node: fx.Node) -> Tensor:
        """Return the tensor behind a placeholder for which `is_constant` holds."""
        return self.state[role(node).name]

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
        note(node, role=Input(kind, name))
        with self.fake:
            node.meta["val"] = torch.empty(tuple(example.shape), dtype=example.dtype)
        note(node, made_by=self.pass_name)
        return node

    def add_constant(self, name: str, value: Tensor, key: Any = None) -> fx.Node:
        """Add a constant to the state and return its placeholder; `name` is made unique and flat.

        With a `key`, constants of one key are one placeholder. The value is shared, not copied.
        """
        if key is not None and key in self._shared:
            return self._shared[key]
        # A dotted name would nest below a parameter's FQN, where a module tree has no room for it.
        name = name.replace(".", "_")
        unique, count = name, 0
        while unique in self.state:
            count += 1
            unique = f"{name}_{count}"
        self.state[unique] = value.detach()
        node = self.add_input(self._constants, unique, value)
        self._describe(node, value)
        if key is not None:
            self._shared[key] = node
        return node

    def store(self, node: fx.Node, value: Tensor) -> None:
        """Let a placeholder for which `is_constant` holds, hold another value."""
        spec: Input = role(node)
        if spec.kind == "constant":
            note(node, role=Input(self._constants, spec.name))
        is_weight = spec.kind == "parameter"
        self.state[spec.name] = torch.nn.Parameter(value.detach(), False) if is_weight else value.detach()
        self._describe(node, value)

    def _describe(self, node: fx.Node, value: Tensor) -> None:
        with self.fake:
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Within, new nodes stand before `node` and come from where it comes from."""
        outer, self._anchor = self._anchor, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._anchor = outer

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """Append a call at the current insertion point, with its value inferred; `like` lends its origin module."""
        like = like or self._anchor
        # The operator's bare name: `%expand_3` reads better than fx's own `%expand_default_3`.
        schema = getattr(target, "_schema", None)
        name = None if schema is None else schema.name.rpartition("::")[2]
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        if like is not None:
            come_from(node, like)
        note(node, made_by=self.pass_name)
        self.refresh(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Infer a node's value again from the values of its arguments."""
        node.meta["val"] = infer(self.fake, node.target, node.args, node.kwargs)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """Return `aten.reshape`, or `x` itself if it has that shape."""
        return x if shape_of(x) == tuple(shape) else self.call(torch.ops.aten.reshape.default, x, list(shape))

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old`, outputs too, use `new`, and erase `old`."""
        succeed(new, old)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

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
            if node.op == "call_function" and not node.users and not writes(node.target):
                self.graph.erase_node(node)
        for node in self.placeholders(*CONSTANT_KINDS):
            if not node.users:
                self.state.pop(role(node).name, None)
                self.graph.erase_node(node)
        self._shared = {key: node for key, node in self._shared.items() if not node._erased}

    def lint(self) -> None:
        """Check the graph after edits; its code is generated when it is first run."""
        self.graph.lint()
        self._module = None

    # Running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate eagerly. `inputs` maps input names to tensors; returns output names to tensors.

        New values of state are among the results, and are what the next run starts from.
        Raises `InputError` if an input is missing or has another dtype or shape than the program was built for.
        """
        args = []
        for node in self.placeholders():
            spec: Input = role(node)
            if spec.kind in _STATE_KINDS:
                args.append(self.state[spec.name])
                continue
            if spec.name not in inputs:
                raise InputError(f"input '{spec.name}' is missing; got {', '.join(inputs) or 'nothing'}")
            args.append(_checked(spec, inputs[spec.name], node.meta["val"]))
        with torch.no_grad():
            results = self._call(args)
        # The tensors themselves stay as they are: clones share them.
        self.state.update({s.name: v for s, v in zip(self.outputs, results, strict=True) if s.kind == "state"})
        return {spec.name: value for spec, value in zip(self.outputs, results, strict=True)}

    def _call(self, args: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._ran:
            # Most graphs are run once, and to generate code takes longer than to interpret the graph.
            self._ran = True
            return fx.Interpreter(torch.nn.Module(), graph=self.graph).run(*args)
        if self._module is None:
            for node in self.placeholders():
                # Of two placeholders one may have the other's target as its name: generated code would mix them up.
                node.target = node.name
            self._module = fx.GraphModule(torch.nn.Module(), self.graph)
        return self._module(*args)

    # Leaving -----------------------------------------------------------------------------------------------------

    @neutral()
    def to_exported_program(self, verifier: Any = None) -> torch.export.ExportedProgram:
        """Return a valid `ExportedProgram`: what it holds first, then user inputs in placeholder order.

        State is a mutated buffer of a copy that belongs to this `ExportedProgram` alone. What surrounds the graph (the
        structure of inputs and outputs, examples, `verifier`) is that of the program that this one was read from.
        """
        ir = self.clone()
        order = [n for kind in _STATE_KINDS for n in ir.placeholders(kind)]
        order += [n for n in ir.placeholders() if n not in set(order)]
        body = next(n for n in ir.graph.nodes if n.op != "placeholder")
        for node in order:
            body.prepend(node)
            # torch.export matches user inputs by target, everything else by name: they must be the same.
            node.target = node.name
        nodes: Any = ir.graph.output_node().args[0]
        # torch.export wants mutations in front.
        returned = sorted(zip(ir.outputs, nodes, strict=True), key=lambda pair: pair[0].kind != "state")
        ir.set_outputs(returned)
        for spec in ir.outputs if self._source is None else ():
            if spec.kind == "state":
                ir.state[spec.name] = ir.state[spec.name].clone()
        ir.lint()
        signature = ExportGraphSignature(
            [_input_spec(node) for node in order], [_output_spec(*pair) for pair in returned]
        )
        return _exported(ir, signature, verifier)


def _copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    copy, nodes = fx.Graph(), {}
    for node in graph.nodes:
        nodes[node] = copy.node_copy(node, nodes.__getitem__)
        nodes[node].meta = dict(node.meta)
    return copy, nodes


def _exported(ir: Ir, signature: ExportGraphSignature, verifier: Any) -> torch.export.ExportedProgram:
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.utils import _pytree as pytree

    source = ir._source
    if source is None:
        user = [n for n in ir.placeholders() if role(n).kind not in _STATE_KINDS]
        examples: Any = (tuple(torch.zeros(tuple(val(n).shape), dtype=val(n).dtype) for n in user), {})
        in_spec = pytree.tree_structure(examples)
        out_spec = pytree.tree_structure(tuple(o for o in ir.outputs if o.kind != "state"))
        names, limits, verifiers = None, {}, [verifier]
    else:
        root: Any = next(entry for entry in source.module_call_graph if entry.fqn == "").signature
        in_spec, out_spec, names = root.in_spec, root.out_spec, root.forward_arg_names
        examples, limits, verifiers = source.example_inputs, source.range_constraints, source.verifiers
    # Like torch.export, leave the root's argument names out: later passes rename nodes.
    call = ModuleCallSignature([], [], in_spec, out_spec, names)
    kinds = {role(node).name: role(node).kind for node in ir.placeholders(*_STATE_KINDS)}
    return torch.export.ExportedProgram(
        root=torch.nn.Module(),
        graph=ir.graph,
        graph_signature=signature,
        state_dict={name: ir.state[name] for name, kind in kinds.items() if kind != "constant"},
        range_constraints=limits,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        example_inputs=examples,
        constants={name: ir.state[name] for name, kind in kinds.items() if kind == "constant"},
        verifiers=verifiers,
    )


def _input_spec(node: fx.Node) -> InputSpec:
    spec: Input = role(node)
    kind = _STATE_KINDS.get(spec.kind, InputKind.USER_INPUT)
    target = spec.name if spec.kind in _STATE_KINDS else None
    return InputSpec(kind, TensorArgument(node.name), target, True if kind == InputKind.BUFFER else None)


# What an output of torch's stands for, in both directions; every other kind is a result of its own.
_OUTPUTS = {OutputKind.BUFFER_MUTATION: "state", OutputKind.USER_INPUT_MUTATION: "input"}


def _output_spec(spec: Output, node: Any) -> OutputSpec:
    kind = next((kind for kind, name in _OUTPUTS.items() if name == spec.kind), OutputKind.USER_OUTPUT)
    argument = TensorArgument(node.name) if isinstance(node, fx.Node) else ConstantArgument("", node)
    return OutputSpec(kind, argument, spec.name if spec.kind in _OUTPUTS.values() else None)


def _checked(spec: Input, value: Any, expected: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"input '{spec.name}' must be a tensor, found {type(value).__name__}")
    if value.dtype != expected.dtype or value.shape != expected.shape:
        raise InputError(
            f"input '{spec.name}' must be {expected.dtype} {list(expected.shape)}, "
            f"found {value.dtype} {list(value.shape)}; the program is compiled for the shapes of its example inputs"
        )
    return value
