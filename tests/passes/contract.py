"""What every pass is held to: the same numbers, a golden text, and nothing left to do for a second run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_passes import TwoSided, pipelines
from mobizo_passes.capture.export import capture
from mobizo_passes.capture.inputs import bind_inputs, name_inputs
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.text import to_text
from mobizo_passes.passes import Pass
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.sites.select import discover
from mobizo_passes.sites.trainable import trainable_fqns
from tests.models import Lora, integers, random, seeded


class Tiny(nn.Module):
    """One LoRA layer [3 -> 4], rank 1, then `body`, by default nothing."""

    def __init__(self, body: Callable[[Tensor], Tensor] | None = None, layers: int = 1) -> None:
        super().__init__()
        self.layer = Lora(3, 4, rank=1, bias=False)
        self.more = nn.ModuleList(Lora(4, 4, rank=1, bias=False) for _ in range(layers - 1))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for layer in self.more:
            y = layer(y)
        return y if self.body is None else self.body(y)


def rows() -> tuple[Tensor, Tensor]:
    """Example inputs f32[2, 3] and labels i64[2]."""
    return random(2, 3), integers(4, 2)


def sequences() -> tuple[Tensor, Tensor]:
    """Example inputs f32[2, 5, 3] and labels i64[2, 5] with one labelled position per example."""
    labels = torch.full((2, 5), -100)
    labels[0, 4], labels[1, 2] = 3, 1
    return random(2, 5, 3), labels


def token_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1))


@dataclass
class Stage:
    """An `Ir` just before a pass, that pass, and values for all inputs that any stage may ask for."""

    ir: Ir
    one: Pass
    values: dict[str, Tensor]

    def run(self, ir: Ir | None = None) -> dict[str, Tensor]:
        return (self.ir if ir is None else ir).run(self.values)

    def apply(self) -> Ir:
        """Return the rewritten copy."""
        ir = self.ir.clone()
        self.one(ir)
        return ir

    def count(self) -> int:
        return self.one(self.ir.clone())


def _pipeline(ir: Ir, max_labels: int | None) -> Iterator[Pass]:
    yield from pipelines.clean()
    yield from pipelines.lift(trainable_fqns(discover(ir), "lora_B"))
    ir.set_outputs([(Output("loss", "loss"), ir.output_node("loss"))])
    ir.eliminate_dead_code()
    ir.lint()
    yield from pipelines.evaluate(max_labels)
    yield from pipelines.step(TwoSided(1), "gaussian", batch_of(ir))
    yield from pipelines.core()


def before(
    kind: type[Pass], model: nn.Module, inputs: Any, loss: Any = F.cross_entropy, max_labels: int | None = None
) -> Stage:
    """Compile a seeded model up to the first pass of a kind."""
    named = name_inputs(seeded(model), inputs, loss)
    ir, _ = capture(model, named, loss)
    scalars = {"seed": torch.tensor([1]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}
    values = {**ir.state, **bind_inputs(named, inputs), **scalars}
    for one in _pipeline(ir, max_labels):
        if isinstance(one, kind):
            return Stage(ir, one, values)
        one(ir)
    raise LookupError(kind)


def targets(ir: Ir) -> list[str]:
    """Operators of a graph in order, as `aten.linear.default`."""
    return [str(n.target) for n in ir.graph.nodes if n.op == "call_function"]


def _made_once(example: Callable[[Any], Stage]) -> Callable[[Any], Stage]:
    """Capture and run the earlier passes once; each call gets a graph of its own."""
    made: list[Stage] = []

    @functools.wraps(example)
    def copied(self: Any) -> Stage:
        if not made:
            made.append(example(self))
        return replace(made[0], ir=made[0].ir.clone())

    return copied


class PassContract:
    """Three of a pass's five tests; a subclass gives `example` and adds at least two: it fires; a near miss."""

    kind: ClassVar[type[Pass]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "example" in vars(cls):
            type.__setattr__(cls, "example", _made_once(cls.example))

    def example(self) -> Stage:
        raise NotImplementedError

    def test_numbers_agree(self) -> None:
        stage = self.example()
        self.compare(stage.run(), stage.run(stage.apply()), stage)

    def compare(self, old: dict[str, Tensor], new: dict[str, Tensor], stage: Stage) -> None:
        """By default a pass changes no output; sums in another order may move the last bits."""
        assert list(new) == list(old)
        for name, value in old.items():
            torch.testing.assert_close(new[name], value, rtol=1e-6, atol=1e-6)

    def test_golden_text(self, golden: Callable[[str, str], None]) -> None:
        stage = self.example()
        text = f"BEFORE\n{to_text(stage.ir)}\nAFTER\n{to_text(stage.apply())}"
        golden(self.kind.name.replace("-", "_"), text)

    def test_a_second_run_changes_nothing(self) -> None:
        stage = self.example()
        after = stage.apply()
        text = to_text(after)
        assert stage.one(after) == 0
        assert to_text(after) == text

    def test_it_says_what_it_needs_and_gives(self) -> None:
        assert self.kind.requires
        assert self.kind.ensures
        assert "BEFORE" in (self.kind.__doc__ or "")
        assert "AFTER" in (self.kind.__doc__ or "")
