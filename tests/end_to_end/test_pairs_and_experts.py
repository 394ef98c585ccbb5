"""A mixture of experts and a model of preferences train in the runtime as they do in eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowering
import runtime_driver
from tests.coverage import hf_rows, pair_rows
from tests.coverage.row import Row
from tests.self_check import only

MIXTURE = next(row for row in hf_rows.ROWS if row.architecture == "OLMoE")
PREFERENCES = next(row for row in pair_rows.PAIRS if "halves" in row.variant)


@pytest.mark.parametrize(("row", "delegated"), [(MIXTURE, 0.5), (PREFERENCES, 1.0)], ids=["experts", "preferences"])
def test_twenty_steps_on_xnnpack(row: Row, delegated: float, tmp_path: Path) -> None:
    model, inputs = row.build(), row.inputs()
    program = row.transform(model, inputs)
    lowered = lowering.lower(only(program, "step", "apply"), target="xnnpack")
    assert lowered.report.methods["step"].delegated_share >= delegated
    lowered.save(tmp_path / "step.pte")
    session, adapter = runtime_driver.Session(tmp_path / "step.pte"), program.initial_adapter()
    for seed in range(20):
        want = program.step(adapter, inputs, seed=seed, lr=1e-2, eps=1e-2)
        got = session.step(inputs, seed=seed, lr=1e-2, eps=1e-2)
        # Each starts from its own adapter: twenty updates by differences of rounded losses lie between.
        torch.testing.assert_close(torch.tensor(got.losses), want.losses, rtol=1e-3, atol=1e-4)
        adapter = want.adapter


def test_experts_are_put_back_and_said() -> None:
    model: Any = MIXTURE.build()
    chosen = model.config._experts_implementation_internal
    program = MIXTURE.transform(model, MIXTURE.inputs())
    assert model.config._experts_implementation_internal == chosen != "batched_mm"
    assert program.history[0].name == "experts-by-token"
    # One layer.
    assert program.history[0].rewrites == 1
