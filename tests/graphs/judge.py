"""What must hold of every random model: it agrees with the reference, or is refused by a message that names a node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

import mobizo_passes as mz
from mobizo_passes.autograd import LOSS_TOLERANCE
from tests.graphs.cases import Case
from tests.text_form import check_text

EPS = 1e-2
# "%name = aten.op in module 'fqn', file, line": which node, where it came from.
NODE = re.compile(r"%\w+ = \S+ in module '[^']+'(, graph\.py, line \d+)?")


def judge(case: Case, options: Mapping[str, Any]) -> mz.UnsupportedOp | None:
    """Return the refusal, or None if program and reference agree and its text reads back; anything else raises."""
    model, inputs = case.build(), case.inputs()
    try:
        program = mz.transform(model, inputs, loss=case.loss_fn(), **options)
    except mz.UnsupportedOp as refusal:
        if not NODE.search(str(refusal)):
            raise AssertionError("the refusal names no node") from refusal
        return refusal.with_traceback(None)
    check_text(program._methods["step"])
    try:
        mz.verify(program, model, inputs, eps=EPS)
    except mz.VerificationFailed:
        if well_conditioned(case, program):
            raise
    return None


def well_conditioned(case: Case, program: mz.TrainingProgram) -> bool:
    """Whether rounding alone leaves the reference's losses within a fraction of the tolerance.

    Adapters that differ in the last place stand for another order of summation. Where that alone moves the losses (a
    LayerNorm over equal features, an arg-max over a tie), float32 decides nothing.
    """
    model, adapter = case.build(), program.initial_adapter()
    for sign in (1, -1):
        moved = {k: v * (1 + sign * torch.finfo(v.dtype).eps) for k, v in adapter.items()}
        near, exact = (
            mz.reference.step(
                model, case.inputs(), one, seed=0, lr=1e-3, eps=EPS, estimator=program.estimator,
                noise_kind=program.noise, loss=case.loss_fn(),
            ).losses
            for one in (moved, adapter)
        )  # fmt: skip
        if not float((near - exact).abs().max()) <= 0.3 * LOSS_TOLERANCE * max(1.0, float(exact.abs().max())):
            return False
    return True
