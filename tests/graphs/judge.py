"""What must hold of every random model: it agrees with the reference, or is refused by a message that names a node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mobizo_passes as mz
from mobizo_passes.testing import check_agreement, well_conditioned
from mobizo_passes.testing.random_models.cases import RandomModel
from tests.text_form import check_text

EPS = 1e-2
# "%name = aten.op in module 'fqn', file, line": which node, where it came from.
NODE = re.compile(r"%\w+ = \S+ in module '[^']+'(, graph\.py, line \d+)?")


def judge(case: RandomModel, options: Mapping[str, Any]) -> mz.UnsupportedOp | None:
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
        check_agreement(model, inputs, program=program, eps=EPS)
    except mz.VerificationFailed:
        if well_conditioned(program, model, inputs, eps=EPS):
            raise
    return None
