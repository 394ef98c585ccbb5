"""A lowered step in ExecuTorch's Inspector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from executorch.devtools import Inspector
from executorch.runtime import Runtime

import lowering
import mobizo_passes as mz
from lowering.errors import LoweringError
from tests.models import Mlp, case, seeded

SCALARS = {"seed": torch.tensor([1]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}


@pytest.mark.filterwarnings("ignore:Unsupported kwarg encountered:UserWarning")
def test_the_inspector_names_operators_modules_and_lines_of_what_was_measured(tmp_path: Path) -> None:
    mlp = case("mlp")
    program = mz.transform(seeded(Mlp()), mlp.inputs(), **mlp.options)
    lowered = lowering.lower(program, check=False, etrecord=True)
    record = lowered.save_etrecord(tmp_path / "step.etrecord")
    profiled = Runtime.get().load_program(lowered.save(tmp_path / "model.pte"), enable_etdump=True)
    values = {**program.initial_adapter(), **program.example_batch(), **SCALARS}
    step = profiled.load_method("step")
    assert step is not None
    step.execute([values[each.name] for each in lowered.manifest.methods["step"].inputs])
    profiled.write_etdump_result_to_file(str(tmp_path / "etdump"), str(tmp_path / "debug"))

    with pytest.warns(UserWarning, match="Output Buffer not found"):
        inspector = Inspector(etdump_path=str(tmp_path / "etdump"), etrecord=str(record))
    events = next(block for block in inspector.event_blocks if block.name == "Execute").events
    call = next(event for event in events if event.name == "DELEGATE_CALL")
    assert call.delegate_backend_name == "XnnpackBackend"
    assert call.perf_data is not None
    assert "aten.linear.default" in call.op_types
    modules = {stack[-1][0] for held in call.module_hierarchy.values() if held for stack in [list(held.values())]}
    assert {name.rpartition("model.")[2] for name in modules} >= {"first", "second", "head"}
    assert any("tests/models.py" in (trace or "") for trace in call.stack_traces.values())
    left = next(event for event in events if "aten.div.Tensor" in event.op_types)
    assert not left.delegate_backend_name

    with pytest.raises(LoweringError, match="no method 'train'; this program has step, apply"):
        lowered.save_etrecord(tmp_path / "x", "train")
    with pytest.raises(LoweringError, match="pass etrecord=True to lower"):
        replace(lowered, recorded=False).save_etrecord(tmp_path / "x")
