"""Programs from their printed form: `parse` reads what `mobizo_passes.graph.text.to_text` writes."""

from __future__ import annotations

import ast
import operator
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode

# It registers our operators.
import mobizo_passes.graph.ops  # noqa: F401
from mobizo_passes.errors import ParseError
from mobizo_passes.graph.facts import Input, note, set_source
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.layout import Layout
from mobizo_passes.graph.overloads import resolve
from mobizo_passes.graph.text import DTYPES, END, NO_SOURCE, type_text

_HELD = ("parameter", "buffer", "constant", "state")
_GIVEN = ("adapter", "tangent", "optimizer", "batch", "seed", "lr", "eps", "projected_gradients", "input")

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_NAMES: dict[str, Any] = {**_DTYPES, "end": END, "inf": float("inf"), "nan": float("nan")}

_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_COMMENT = re.compile(rf"({_STRING})|\s+#(?:\s|$)")
_LINE = re.compile(r"(?P<output>return )?%(?P<name>\w+): (?P<type>.+?) = (?P<rest>.+)")
_ROLE = re.compile(rf"(?P<kind>\w+)(?: (?P<name>{_STRING}))?")
_TENSOR = re.compile(r"(?P<dtype>[\w.]+)\[(?P<shape>\d*(?:, \d+)*)\]")
# Above the nodes that come from it: the line of a model.
_SOURCE = re.compile(r"# (?P<path>\S.*?):(?P<line>\d+) in (?P<function>\S+?)(?:: (?P<text>.*))?")
_BATCH = re.compile(r"batch (\d+)(?: outer (\d+))?")
# `%x` is no Python; with this in its place the arguments of a call are.
_REFERENCE = re.compile(rf"({_STRING})|%(\w+)")
_NODE = "_node_"


def parse(text: str, state: Mapping[str, Tensor] | None = None) -> Ir:
    """Read a program back from its text, as `TrainingProgram.text` and `print` give it; its own text is the same again.

    What the text does not say is not read: the values of weights and constants come from `state`, by name; without
    it each is filled by `seeded_value`. Types are worked out from the operators again and compared with the text.
    Operators of other libraries must be registered before.

    Raises:
        ParseError: a line is not of a program's printed form, names something that does not exist, or says another
            type than its operator gives; or `state` lacks a tensor, or has another dtype or shape.
    """
    reader = _Reader(state)
    number = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            reader.comment(line.strip())
        elif line.strip():
            reader.read(number, line.strip())
    return reader.finish(number)


def seeded_value(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that depends on name, dtype and shape alone: N(0, 0.4²); integers and booleans are 0 and 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.randn(shape, generator=generator) * 0.4).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


class _Reader:
    """A program in the making, and the number of the line that is being read."""

    def __init__(self, state: Mapping[str, Tensor] | None) -> None:
        graph = fx.Graph()
        self.end = graph.output(())
        self.ir = Ir(graph, {}, (), FakeTensorMode())
        self.given = state
        self.nodes: dict[str, fx.Node] = {}
        self.outputs: list[tuple[Output, fx.Node]] = []
        self.called = False
        self.number = 0
        self.source: re.Match[str] | None = None

    def error(self, message: str) -> ParseError:
        return ParseError(self.number, message)

    def comment(self, line: str) -> None:
        """Read a line that is a comment: it may be the line of a model that the nodes below come from, or end such."""
        found = _SOURCE.fullmatch(line)
        if found or line == NO_SOURCE:
            self.source = found

    def read(self, number: int, line: str) -> None:
        """Read one line that is neither empty nor a comment."""
        self.number = number
        code, comment = _split(line)
        found = _LINE.fullmatch(code)
        if found is None:
            raise self.error(f"expected '%name: type = ...' or 'return %name: type = role', found {code!r}")
        name, wanted, rest = found["name"], found["type"], found["rest"]
        if found["output"]:
            self.output(name, wanted, rest)
            return
        if name in self.nodes:
            raise self.error(f"%{name} is defined twice; give each node a name of its own")
        node = self.call(name, rest) if "(" in _REFERENCE.sub("", rest) else self.input(name, wanted, rest)
        if node.name != name:
            raise self.error(f"%{name} can't be the name of a node; a free name is %{node.name}")
        self.nodes[name] = node
        self.compare(node, wanted)
        self.note(node, comment)

    def finish(self, last: int) -> Ir:
        """Return the program."""
        if not self.outputs:
            raise ParseError(
                max(last, 1), "the text ends without an output; expected a line 'return %name: type = role'"
            )
        self.ir.set_outputs(self.outputs)
        self.ir.lint()
        return self.ir

    # Lines -------------------------------------------------------------------------------------------------------

    def input(self, name: str, kind_of_value: str, rest: str) -> fx.Node:
        spec = Input(*self.role(rest))
        if spec.kind not in _HELD + _GIVEN:
            raise self.error(
                f"no input is a '{spec.kind}'; expected {', '.join(_HELD + _GIVEN)}, or a call 'operator(...)'"
            )
        if self.called:
            raise self.error(f"input %{name} stands below a call; inputs come first")
        found = _TENSOR.fullmatch(kind_of_value)
        dtype = found and self.dtype(found["dtype"])
        if not found or not isinstance(dtype, torch.dtype):
            raise self.error(f"the type of an input is a dtype and a shape, such as f32[2, 3]; found {kind_of_value!r}")
        shape = tuple(int(size) for size in found["shape"].split(", ") if size)
        if spec.kind in _HELD:
            value = self.value(spec, dtype, shape)
            self.ir.state[spec.name] = nn.Parameter(value, requires_grad=False) if spec.kind == "parameter" else value
        with self.ir.graph.inserting_before(self.end):
            node = self.ir.graph.create_node("placeholder", name, name=name)
        with self.ir.fake:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        note(node, role=spec)
        return node

    def call(self, name: str, rest: str) -> fx.Node:
        self.called = True
        code = _REFERENCE.sub(lambda m: m[1] or f"{_NODE}{m[2]}", rest)
        try:
            tree = ast.parse(code, mode="eval").body
        except SyntaxError as error:
            raise self.error(f"expected a call 'operator(argument, ...)', found {rest!r}: {error.msg}") from error
        if not isinstance(tree, ast.Call):
            raise self.error(f"expected a call 'operator(argument, ...)', found {rest!r}")
        args = [self.argument(each) for each in tree.args]
        kwargs = {str(each.arg): self.argument(each.value) for each in tree.keywords}
        target = self.operator(ast.unparse(tree.func), args, kwargs)
        with self.ir.graph.inserting_before(self.end):
            node = self.ir.graph.create_node("call_function", target, tuple(args), kwargs, name)
        try:
            self.ir.refresh(node)
        except Exception as error:  # torch raises many unrelated types; all are about these arguments
            reason = str(error).strip().partition("\n")[0]
            raise self.error(f"{ast.unparse(tree.func)} does not take these arguments: {reason}") from error
        if self.source is not None:
            set_source(node, **{name: value or "" for name, value in self.source.groupdict().items()})
        return node

    def output(self, name: str, wanted: str, rest: str) -> None:
        node = self.reference(name)
        self.compare(node, wanted)
        self.outputs.append((Output(*self.role(rest)), node))

    # Parts of lines ----------------------------------------------------------------------------------------------

    def role(self, text: str) -> tuple[str, str]:
        found = _ROLE.fullmatch(text)
        if found is None:
            raise self.error(f"expected a role, with a quoted name if it needs one, such as batch 'x'; found {text!r}")
        return found["kind"], ast.literal_eval(found["name"]) if found["name"] else found["kind"]

    def value(self, spec: Input, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if self.given is None:
            return seeded_value(spec.name, dtype, shape)
        if spec.name not in self.given:
            raise self.error(f"'{spec.name}' is missing in state=, which has {', '.join(self.given) or 'nothing'}")
        value = self.given[spec.name].detach()
        if value.dtype is not dtype or tuple(value.shape) != shape:
            raise self.error(f"'{spec.name}' is {type_text(value)} in state=, other than in the text")
        return value

    def dtype(self, name: str) -> Any:
        return _DTYPES.get(name, getattr(torch, name.removeprefix("torch."), None))

    def reference(self, name: str) -> fx.Node:
        if name not in self.nodes:
            raise self.error(f"%{name} is not defined above")
        return self.nodes[name]

    def operator(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if name == "getitem":
            return operator.getitem
        space, _, rest = name.partition(".")
        op, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, space), op, None) if op else None
        if not isinstance(packet, OpOverloadPacket):
            raise self.error(f"there is no operator '{name}'; if a library of yours registers it, import that first")
        target = getattr(packet, overload, None) if overload else resolve(packet, args, kwargs)
        if not isinstance(target, OpOverload):
            known = ", ".join(packet.overloads())
            wanted = f"'{overload}'" if overload else "that takes these arguments"
            raise self.error(f"{space}.{op} has no overload {wanted}; it has {known}")
        return target

    def argument(self, tree: ast.expr) -> Any:
        match tree:
            case ast.List() | ast.Tuple():
                return [self.argument(each) for each in tree.elts]
            case ast.Name(id=name) if name.startswith(_NODE):
                return self.reference(name.removeprefix(_NODE))
            case ast.Name(id=name) if name in _NAMES:
                return _NAMES[name]
            case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
                return -float("inf")
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                value = getattr(torch, name, None)
                if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
                    return value
            case ast.Call(func=ast.Name(id="device"), args=[], keywords=keywords):
                return torch.device(**{str(each.arg): self.argument(each.value) for each in keywords})
            case _:
                try:
                    return ast.literal_eval(tree)
                except ValueError:
                    pass
        text = ast.unparse(tree).replace(_NODE, "%")
        raise self.error(
            f"expected %name, a number, a string, a list, a dtype, None, True, False or end; found {text!r}"
        )

    def compare(self, node: fx.Node, wanted: str) -> None:
        found = type_text(node.meta["val"])
        if found != wanted:
            raise self.error(
                f"%{node.name} is {found}, the text says {wanted}; correct the type, or what it is made of"
            )

    def note(self, node: fx.Node, comment: str) -> None:
        """Note what the comment says: ``module | pass | facts``."""
        module, made_by, facts, *more = (*(each.strip() for each in comment.split("|")), "", "")
        if any(more):
            raise self.error(f"expected a comment '# module | pass | facts', found {comment!r}")
        if module:
            node.meta["nn_module_stack"] = {module: (module, "")}
        note(node, made_by=made_by or "capture")
        for fact in filter(None, facts.split(", ")):
            batch = _BATCH.fullmatch(fact)
            if fact == "expanded":
                note(node, expanded=True)
            elif fact == "batch lost":
                note(node, batched=True)
            elif batch:
                note(node, batched=True, layout=Layout(int(batch[1]), int(batch[2] or 1)))
            elif fact.startswith("noise of "):
                note(node, noise_of=fact.removeprefix("noise of "))
            else:
                raise self.error(
                    f"expected expanded, batch DIM, batch DIM outer N, batch lost or noise of FQN; found {fact!r}"
                )


def _split(line: str) -> tuple[str, str]:
    """A line's code and comment; a # in a string starts none."""
    for found in _COMMENT.finditer(line):
        if found[1] is None:
            return line[: found.start()], line[found.end() :]
    return line, ""
