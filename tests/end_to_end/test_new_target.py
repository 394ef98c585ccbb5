"""A target that is one class and one call of `register`, nothing else edited: from the command line to the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.nn.functional as F

import lowering
import mobizo_passes as mz
from lowering.targets import TARGETS, TargetOption, register
from lowering.targets.xnnpack.target import XnnpackTarget
from mobizo_passes.graph.ir import Ir
from mobizo_passes.graph.passes import Pass
from runtime_driver import Session
from tests.driver import text_model
from tests.driver.command import fails
from tests.driver.conftest import cli  # noqa: F401
from tests.passes.contract import Tiny, rows


@dataclass(frozen=True)
class CountNodes(Pass):
    """A pass of the new target's own: changes nothing."""

    name: ClassVar[str] = "count-nodes"

    def rewrite(self, ir: Ir) -> int:
        return len(ir.graph.nodes)


class Tuned(XnnpackTarget):
    """XNNPACK under another name, with an option and a pipeline of its own."""

    name = "tuned"
    options = (TargetOption("count", ("no", "yes"), "no", "Whether the nodes are counted."),)

    @property
    def passes(self) -> Sequence[Any]:
        return (*super().passes, *([CountNodes()] if self.chosen["count"] == "yes" else []))


@pytest.fixture
def tuned() -> Iterator[Tuned]:
    target = Tuned()
    yield register(target)  # pyright: ignore[reportReturnType]
    del TARGETS[target.name]


@pytest.mark.usefixtures("tuned")
def test_it_lowers_and_runs(tmp_path: Path):
    program = mz.transform(Tiny(), rows(), loss=F.cross_entropy, estimator=mz.TwoSided(1))
    lowered = lowering.lower(program, target="tuned", count="yes")
    assert lowered.report.partitions > 0
    assert "count-nodes" in [record.name for record in lowered.report.methods["step"].passes]
    assert lowered.manifest.options == {"count": "yes"}
    assert lowered.manifest.backend == "XnnpackBackend"
    session = Session(lowered.save(tmp_path / "model.pte"))
    batch = dict(zip(session.manifest.batch.inputs, rows(), strict=True))
    expected = program.step(program.initial_adapter(), rows(), seed=0, lr=0.1, eps=1e-2)
    found = session.step(batch, seed=0, lr=0.1, eps=1e-2)
    assert found.losses == pytest.approx(expected.losses.tolist(), rel=1e-5)
    plain = lowering.lower(program, target="tuned")
    assert plain.manifest.options == {"count": "no"}
    assert "count-nodes" not in [record.name for record in plain.report.methods["step"].passes]


@pytest.mark.usefixtures("tuned")
def test_the_command_line_offers_it(cli, tmp_path: Path):  # noqa: F811
    assert lowering.available()["tuned"].runs
    shown = cli("targets").out
    assert "Whether the nodes are counted." in shown
    model = text_model.save_model(tmp_path / "model")
    task = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", 8, "--rank", 2)
    command = ("lower", model, *task, "--queries", 1, "--batch", 2, "-o", "model.pte", "--target", "tuned")
    fails(cli(*command, "--option", "count=twice"), "count='twice' is not possible", "expected one of no, yes")
    done = cli(*command, "--option", "count=yes")
    assert done.code == 0, done.err
    assert "tuned, count=yes" in cli("inspect", "model.pte").out
    assert cli("export-adapter", "model.pte", "-o", "adapter").code == 0
