"""Typed errors of the compiler. Every message says what was expected, what was found, and what to do."""

from __future__ import annotations

import torch

from mobizo_passes.graph.facts import module_of, source_line


class MobizoError(Exception):
    """Base of every error that `mobizo_passes` raises for a user."""


class InputError(MobizoError):
    """Example inputs, adapter tensors, labels or options do not fit the model or the program."""


class LibraryMissing(MobizoError, ImportError):
    """What is asked for needs a library that is not installed."""


class CaptureError(MobizoError):
    """`torch.export` could not capture the model, or its outputs do not hold a loss."""


class NoLoRASites(MobizoError):
    """The exported graph holds no LoRA site that the request selects."""


class UnsupportedOp(MobizoError):
    """A perturbed value reaches an operator for which no rule proves group independence."""


class BatchCoupled(UnsupportedOp):
    """A perturbed value reaches an operator that mixes examples of the batch."""


class ParseError(MobizoError):
    """The text of a program can't be read back; `line` is the number of the line, counted from one."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


class BatchingRuleError(MobizoError):
    """A registered batching rule is not true: the operator does something else than the rule says."""


class ContractError(MobizoError):
    """A graph is not what a pass requires or ensures, or holds what its dialect has no room for.

    `where` names the pass or the stage, `expected` the property or rule, `node` the node that breaks it, if it is one.
    """

    def __init__(self, message: str, where: str, expected: str, node: torch.fx.Node | None) -> None:
        super().__init__(message)
        self.where, self.expected, self.node = where, expected, node


class VerificationFailed(MobizoError):
    """The transformed program and the sequential reference disagree."""


def origin(node: torch.fx.Node) -> str:
    """Return ``module FQN (source line)`` for a node, as far as the export recorded them."""
    path, _, rest = source_line(node).removeprefix("File ").partition(", ")
    source = f", {path.strip(chr(34)).rsplit('/', 1)[-1]}, {rest}" if path else ""
    return f"module '{module_of(node) or '<top level>'}'{source}"


def describe(node: torch.fx.Node) -> str:
    """Return ``%name = target`` with its origin, for error messages."""
    return f"%{node.name} = {node.target} in {origin(node)}"
