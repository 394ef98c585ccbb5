"""The one module of `lowering` that edits graph, signature and constants of an ExportedProgram together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from mobizo_passes.graph.nodes import shape_of

ORIGIN_KEYS = ("nn_module_stack", "stack_trace")

# What a node was before the passes. XNNPACK's stage looks for linears by it (and, without a source function, by the
# module), and would take an adapter's `bmm` for one.
STALE_KEYS = ("torch_fn", "from_node")
NO_SOURCE = [("", "mobizo")]
CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class ProgramEditor:
    """A private copy of an ExportedProgram's graph, with helpers that keep values, origins and signature right.

    The passes work on `graph`; `finish()` gives a new, valid ExportedProgram and leaves the one it started from as
    it was. Weights are never copied: they are the same tensor objects before and after.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.graph = Graph()
        self._fake_mode = _fake_mode_of(program)
        mapping: dict[Node, Node] = {}
        result = self.graph.graph_copy(program.graph, mapping)
        self.graph.output(result)
        new_name = {old.name: new.name for old, new in mapping.items()}
        self._specs: dict[str, InputSpec] = {
            new_name[spec.arg.name]: spec for spec in program.graph_signature.input_specs
        }
        self._mutated = frozenset(program.graph_signature.buffers_to_mutate.values())
        self._constants: dict[str, Any] = dict(program.constants)
        self._new_state: dict[str, torch.Tensor] = {}
        self._anchor: Node | None = None
        self._constant_nodes: dict[tuple[Any, ...], Node] = {}

    # -- reading ------------------------------------------------------------------------------------------------

    def find(self, *targets: Any) -> list[Node]:
        """Nodes of the graph, in order, that call one of `targets` (a snapshot: safe to edit while iterating)."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def is_constant(self, node: Node) -> bool:
        """Whether `node` is a parameter, buffer or constant placeholder that the program never writes."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return spec is not None and spec.kind in CONSTANT_KINDS and spec.target not in self._mutated

    def is_input(self, node: Node) -> bool:
        """Whether `node` is a placeholder whose value differs between calls: supplied by the caller, or written."""
        return node.op == "placeholder" and not self.is_constant(node)

    def constant_value(self, node: Node) -> torch.Tensor:
        """The tensor behind a placeholder for which `is_constant` holds."""
        spec = self._specs[node.name]
        assert spec.target is not None
        for store in (self._new_state, self._program.state_dict):
            if spec.target in store:
                return store[spec.target]
        return self._constants[spec.target]

    def fqn_of(self, node: Node) -> str | None:
        """FQN of the parameter, buffer or constant behind a placeholder."""
        spec = self._specs.get(node.name)
        return spec.target if spec is not None else None

    def kind_of(self, node: Node) -> InputKind | None:
        """What stands behind a placeholder; None for another node."""
        spec = self._specs.get(node.name) if node.op == "placeholder" else None
        return spec.kind if spec is not None else None

    # -- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """New nodes go before `node` and inherit its origin (module stack, stack trace)."""
        outer, self._anchor = self._anchor, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._anchor = outer

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert a call at the place that `before` set; its `meta["val"]` is computed on fake tensors."""
        node = self.graph.call_function(target, args, kwargs)
        self.revalue(node)
        if self._anchor is not None:
            for key in ORIGIN_KEYS:
                if key in self._anchor.meta:
                    node.meta[key] = self._anchor.meta[key]
        return node

    def revalue(self, node: Node) -> None:
        """Compute `node.meta["val"]` anew from its inputs' values."""
        args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
        target: Any = node.target
        with self._fake_mode, torch.no_grad():
            node.meta["val"] = target(*args, **kwargs)

    def reshape(self, x: Node, shape: list[int]) -> Node:
        """`aten.reshape`, or `x` itself when it already has that shape."""
        if list(shape_of(x)) == list(shape):
            return x
        return self.call(torch.ops.aten.reshape.default, x, list(shape))

    def constant(self, value: torch.Tensor, hint: str, key: tuple[Any, ...] | None = None) -> Node:
        """A new constant placeholder holding `value`; with `key`, one placeholder per key is made and shared."""
        if key is not None and key in self._constant_nodes:
            return self._constant_nodes[key]
        taken = {spec.target for spec in self._specs.values()}
        index = 0
        while (fqn := f"_{hint}_{index}") in taken or fqn in self._new_state:
            index += 1
        first_input = next((n for n in self.graph.nodes if self.is_input(n)), None)
        place = first_input if first_input is not None else _first_non_placeholder(self.graph)
        with self.graph.inserting_before(place):
            node = self.graph.placeholder(f"c{fqn}")
        value = value.detach()
        node.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        self._new_state[fqn] = value
        # A buffer, not a constant tensor: ExecuTorch fails to copy the latter into a second partition.
        self._specs[node.name] = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), fqn, persistent=True)
        if key is not None:
            self._constant_nodes[key] = node
        return node

    def store(self, node: Node, value: torch.Tensor) -> None:
        """Let the placeholder `node`, for which `is_constant` holds, hold `value` under its FQN, as a buffer."""
        spec = self._specs[node.name]
        assert spec.target is not None
        self._constants.pop(spec.target, None)
        self._new_state[spec.target] = value.detach()
        if spec.kind is InputKind.CONSTANT_TENSOR:
            self._specs[node.name] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=True)
        elif spec.kind is InputKind.PARAMETER:
            self._new_state[spec.target] = torch.nn.Parameter(value.detach(), requires_grad=False)
        node.meta["val"] = self._fake_mode.from_tensor(value.detach(), static_shapes=True)

    def replace(self, old: Node, new: Node) -> None:
        """Every user of `old` (outputs too) uses `new`; `old` is erased when nothing else needs it."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def clean(self) -> None:
        """Drop what no output needs: dead calls, and constants that nobody reads any more."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and not node.users and self.is_constant(node):
                del self._specs[node.name]
                self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        self._constant_nodes = {k: n for k, n in self._constant_nodes.items() if n in alive}

    def finish(self) -> ExportedProgram:
        """The edited program, as a new ExportedProgram over the same weights."""
        self.clean()
        for node in self.graph.nodes:
            for key in STALE_KEYS:
                node.meta.pop(key, None)
            node.meta["source_fn_stack"] = NO_SOURCE
            if node.op == "placeholder":
                node.target = node.name  # torch's retracing finds placeholders by either: they must agree
        self.graph.lint()
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        inputs = [_renamed(self._specs[n.name], n.name) for n in placeholders]
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        outputs: list[OutputSpec] = []
        for spec, value in zip(self._program.graph_signature.output_specs, output.args[0], strict=True):
            arg: Any = TensorArgument(name=value.name) if isinstance(value, Node) else spec.arg
            outputs.append(OutputSpec(spec.kind, arg, spec.target))
        used = {spec.target for spec in inputs if spec.kind in CONSTANT_KINDS}
        return ExportedProgram(
            root=GraphModule(torch.nn.Module(), self.graph),
            graph=self.graph,
            graph_signature=ExportGraphSignature(input_specs=inputs, output_specs=outputs),
            state_dict={k: v for k, v in {**self._program.state_dict, **self._new_state}.items() if k in used},
            range_constraints=self._program.range_constraints,
            module_call_graph=_root_call(self._program),
            example_inputs=self._program.example_inputs,
            constants={k: v for k, v in self._constants.items() if k in used},
            verifiers=self._program.verifiers,
        )


def _root_call(program: ExportedProgram) -> list[ModuleCallEntry]:
    """The call graph's root alone, without node names, as `torch.export` writes it: passes may rename nodes."""
    root = next(entry for entry in program.module_call_graph if entry.fqn == "")
    signature = root.signature
    if signature is None:
        return [root]
    nameless = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=signature.in_spec,
        out_spec=signature.out_spec,
        forward_arg_names=signature.forward_arg_names,
    )
    return [ModuleCallEntry(fqn="", signature=nameless)]


def _renamed(spec: InputSpec, name: str) -> InputSpec:
    if isinstance(spec.arg, ConstantArgument) or spec.arg.name == name:
        return spec
    return InputSpec(spec.kind, TensorArgument(name=name), spec.target, spec.persistent)


def _first_non_placeholder(graph: Graph) -> Node:
    return next(n for n in graph.nodes if n.op != "placeholder")


def _fake_mode_of(program: ExportedProgram) -> Any:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()
