"""What a pass is, what it requires and ensures, and how passes are run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from mobizo_passes.errors import ContractError, describe
from mobizo_passes.graph.dialect import Dialect
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.operators import writes
from mobizo_passes.graph.text import to_text

#: A node that breaks a property (None: the graph as a whole does), and what was found.
Violation = tuple[Node | None, str]


@dataclass(frozen=True)
class Property:
    """Something that holds of a graph or does not: `violations` yields what breaks it."""

    name: str
    violations: Callable[[Ir], Iterable[Violation]]

    def check(self, ir: Ir, where: str) -> None:
        """Raise `ContractError`, which names the property, the node and what was found, unless it holds."""
        for node, found in self.violations(ir):
            place = "" if node is None else f"\n  at {describe(node)}"
            raise ContractError(f"{where}: expected {self.name}, found {found}{place}", where, self.name, node)


def _impure(ir: Ir) -> Iterator[Violation]:
    for node in ir.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            yield node, f"a {node.op} node"
        elif writes(node.target):
            yield node, "an operator that writes to an argument"


FUNCTIONAL = Property("a functional graph", _impure)


def absent(*targets: Any) -> Property:
    """No call of one of these operators."""
    names = ", ".join(dict.fromkeys(str(target).removeprefix("aten.") for target in targets))
    return Property(f"no {names}", lambda ir: ((node, str(node.target)) for node in ir.find(*targets)))


def has_input(*kinds: str) -> Property:
    """An input of one of these kinds."""

    def violations(ir: Ir) -> Iterator[Violation]:
        if not ir.placeholders(*kinds):
            yield None, f"the inputs {', '.join(node.name for node in ir.placeholders()) or 'none'}"

    return Property(f"an input that is {' or '.join(kinds)}", violations)


def has_output(*kinds: str) -> Property:
    """An output of one of these kinds."""

    def violations(ir: Ir) -> Iterator[Violation]:
        if not any(spec.kind in kinds for spec in ir.outputs):
            yield None, f"the outputs {', '.join(spec.kind for spec in ir.outputs) or 'none'}"

    return Property(f"an output that is {' or '.join(kinds)}", violations)


def checking() -> bool:
    """Whether graphs are checked after every pass: ``MOBIZO_CHECK=1``, as in the tests."""
    return os.environ.get("MOBIZO_CHECK", "") not in ("", "0")


class Pass:
    """A rewrite of an `Ir` in place. Subclasses are frozen dataclasses whose fields are the options.

    `requires` is checked before every run, so it must be cheap; `ensures` after it, where graphs are checked. Running a
    pass twice changes nothing more.
    """

    #: Kebab-case.
    name: ClassVar[str]
    requires: ClassVar[Sequence[Property]] = ()
    ensures: ClassVar[Sequence[Property]] = ()
    # False for a pass whose new nodes get their users only in a later pass.
    prunes: ClassVar[bool] = True

    def rewrite(self, ir: Ir) -> int:
        """Rewrite the graph; returns how many places were rewritten."""
        raise NotImplementedError

    def unmet(self, ir: Ir) -> Iterable[Violation]:
        """What breaks that part of the promise which depends on the pass's options."""
        return ()

    def __call__(self, ir: Ir) -> int:
        """Run the pass: check what it requires, stamp the nodes it creates, drop dead code, check what it ensures.

        Raises:
            ContractError: the graph is not what the pass requires, or, where graphs are checked, not what it ensures.
        """
        for each in self.requires:
            each.check(ir, f"before {self.name}")
        ir.pass_name = self.name
        count = self.rewrite(ir)
        if self.prunes:
            ir.eliminate_dead_code()
        ir.lint()
        if checking():
            for each in (*self.ensures, Property("what its options promise", self.unmet)):
                each.check(ir, f"after {self.name}")
        return count


class NodePass(Pass):
    """A pass that looks at the calls of some operators one by one."""

    operators: ClassVar[Sequence[Any]]

    def replacement(self, ir: Ir, node: Node) -> Node | None:
        """What stands for `node`, inserted before it; None, and nothing inserted, if it stays."""
        raise NotImplementedError

    def rewrite(self, ir: Ir) -> int:
        count = 0
        for node in ir.find(*self.operators):
            with ir.before(node):
                new = self.replacement(ir, node)
            if new is not None:
                ir.replace(node, new)
                count += 1
        return count


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: its name, how many places it rewrote, and, if texts are kept, the program on either side.

    `doc` is the pass's docstring.
    """

    name: str
    rewrites: int
    before: str = field(default="", repr=False)
    after: str = field(default="", repr=False)
    doc: str = field(default="", repr=False)


def run_passes(
    ir: Ir,
    passes: Iterable[Pass],
    history: list[PassRecord] | None = None,
    *,
    texts: bool = True,
    dialect: Dialect | None = None,
) -> Ir:
    """Run passes in order on `ir` in place, adding a record of each to `history`, with or without texts; returns `ir`.

    Where graphs are checked, the result of each pass must be of the `dialect`.
    """
    texts = texts and history is not None
    text = to_text(ir) if texts else ""
    for one in passes:
        count = one(ir)
        if dialect is not None and checking():
            dialect.check(ir, f"after {one.name}")
        before, text = text, to_text(ir) if texts else ""
        if history is not None:
            history.append(PassRecord(one.name, count, before, text, (inspect.getdoc(one) or "") if texts else ""))
    return ir
