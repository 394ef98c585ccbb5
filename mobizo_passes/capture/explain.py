"""What torch.export's errors mean for a model: the line, what depends on data there, and what to write instead."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import Tensor, fx

from mobizo_passes.capture.known import change_for
from mobizo_passes.errors import describe
from mobizo_passes.graph.facts import source_line, source_of

_OURS = Path(__file__).parent
_TORCH = Path(torch.__file__).parent

_TO_PYTHON = re.compile(r"\.item\(|\.tolist\(|\bint\(|\bfloat\(|\bbool\(|\brange\(|\bprint\(|\bf[\"']")
_DECISION = re.compile(r"^(if|elif|while|assert)\b|\bif\b.+\belse\b|\b(and|or|not)\b|\b(all|any|max|min)\(")
_KEPT = "fake tensor in the exported program constant's list"

_AS_TENSOR = (
    "keep it a tensor (h * k, not h * k.item()); a number that is the same for all batches can be given as a Python "
    "number among the example inputs"
)
_BOTH_SIDES = (
    "compute both sides and choose with torch.where(condition, a, b); a loop needs a fixed number of rounds, and a "
    "check that only guards can be left out"
)
_ASSERTION = (
    "a check that only guards can be left out; one in a library's code is gone where Python runs with -O "
    "(PYTHONOPTIMIZE=1)"
)
_FIXED_SIZE = (
    "keep the size fixed: multiply by the mask or use torch.where, gather at positions found by topk or cumsum, or "
    "compute indices once outside of forward"
)


def explain(error: BaseException, model: str) -> str:
    """Return the message for an export that failed: what happened, where in the model's source, what to do."""
    place = _place(error)
    line = place.line or "" if place is not None else ""
    text = str(error).strip()
    first = text.splitlines()[0] if text else type(error).__name__
    where = "" if place is None else f"\n  at {Path(place.filename).name}, line {place.lineno}, in {place.name}: {line}"
    what, advice = _meaning(error, text, first, line)
    advice = (change_for(place.filename, line) if place is not None else "") or advice
    return f"torch.export could not capture {model}: {what}{where}" + (f"\n  {advice}" if advice else "")


def data_dependent(node: fx.Node) -> str:
    """Return the message for a node whose number or size depends on the values of tensors."""
    line = _last_line(node)
    if isinstance(node.meta["val"], Tensor | tuple | list):
        what, advice = (
            "how many elements it has is data-dependent: values decide",
            _FIXED_SIZE,
        )
    else:
        what, advice = "it turns the value of a tensor into a Python number, which is data-dependent", _AS_TENSOR
    source = source_line(node)
    advice = change_for(source.removeprefix('File "').partition('"')[0], source + line) or advice
    return f"a program is compiled for fixed sizes, but {what}: {describe(node)}{line}\n  {advice}"


def _meaning(error: BaseException, text: str, first: str, line: str) -> tuple[str, str]:
    kind = type(error).__name__
    if kind == "GuardOnDataDependentSymNode" or "data-dependent" in text:
        if line.startswith("assert"):
            return "an assertion reads the value of a tensor, which is data-dependent", _ASSERTION
        if _DECISION.search(line) and not re.search(r"\.item\(|\.tolist\(", line):
            what = "Python decides by the value of a tensor, which is data-dependent: known only when the program runs"
            return what, _BOTH_SIDES
        if _TO_PYTHON.search(line):
            return "the value of a tensor becomes a Python number, which is data-dependent", _AS_TENSOR
        return "what runs, or how large something is, is data-dependent: the value of a tensor decides", _FIXED_SIZE
    if ".numpy()" in text or "Cannot access data pointer" in text or "__array__" in text:
        what = "NumPy (or other code outside of torch) reads the values of a tensor, which the exported program can't"
        return what, "use the torch function of the same name, or compute it before forward and pass it as an input"
    if _KEPT in text:
        attribute = re.search(r"model attribute: (?:model\.)?([\w.]+)", text)
        name = attribute.group(1).rstrip(".").rsplit(".", 1)[0] if attribute else "a module"
        return (
            f"forward computes a tensor and keeps it on the model, in '{name}'",
            "return it or pass it on instead",
        )
    if kind == "UncapturedHigherOrderOpError":
        return (
            "a higher-order operator (torch.cond, torch.while_loop, scan) can't be exported inside a step",
            _BOTH_SIDES,
        )
    if "ctc_loss" in text:
        return (
            "CTC loss is not supported: it sums over all alignments in a loop of its own, whose sizes depend on the "
            "values of the lengths, and no target has an operator for it",
            "train on framewise labels (a forced alignment) with F.cross_entropy, which needs one label per frame",
        )
    operator = re.match(r"^(aten|\w+)[.:]+\w+(\.\w+)?$", first)
    if (
        kind in ("UnsupportedOperatorException", "DynamicOutputShapeException", "DataDependentOutputException")
        or operator
    ):
        return (
            f"the operator {first} can't be exported: its sizes are data-dependent, or torch does not know them",
            f"{_FIXED_SIZE}; an operator of your own needs torch.library.register_fake",
        )
    named = "" if kind in ("RuntimeError", "UserError", "Unsupported") else f"{kind}: "
    return f"{named}{first}", ""


def _place(error: BaseException) -> traceback.FrameSummary | None:
    """The last line outside of torch and of this compiler that the error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.filename.startswith("<") or path.is_relative_to(_OURS) or path.is_relative_to(_TORCH):
            continue
        return frame
    return None


def _last_line(node: fx.Node) -> str:
    _, found, text = source_of(node).partition(": ")
    return found + text
