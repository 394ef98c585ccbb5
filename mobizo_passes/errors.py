"""Typed errors of the compiler. Every message says what was expected, what was found, and what to do."""

from __future__ import annotations

import torch


class MobizoError(Exception):
    """Base of every error that `mobizo_passes` raises for a user."""


class InputError(MobizoError):
    """Example inputs, adapter tensors, labels or options do not fit the model or the program."""


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


class VerificationFailed(MobizoError):
    """The transformed program and the sequential reference disagree."""


def origin(node: torch.fx.Node) -> str:
    """Return ``module FQN (source line)`` for a node, as far as the export recorded them."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    source = ""
    if lines:
        path, _, rest = lines[-1].removeprefix("File ").partition(", ")
        source = f"{path.strip(chr(34)).rsplit('/', 1)[-1]}, {rest}"
    return f"module '{module or '<top level>'}'" + (f", {source}" if source else "")


def describe(node: torch.fx.Node) -> str:
    """Return ``%name = target`` with its origin, for error messages."""
    return f"%{node.name} = {node.target} in {origin(node)}"
