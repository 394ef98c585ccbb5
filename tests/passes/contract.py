"""What every pass is held to, on programs written down as text: the rewrite, line by line; the same numbers; nothing
left to do for a second run. Beside it, the smallest models with LoRA, for what a capture has a part in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobizo_passes import TwoSided, parse, pipelines
from mobizo_passes.capture.export import capture
from mobizo_passes.capture.inputs import bind_inputs, name_inputs
from mobizo_passes.graph.facts import role
from mobizo_passes.graph.ir import Ir, Output
from mobizo_passes.graph.parse import seeded_value
from mobizo_passes.graph.text import to_text
from mobizo_passes.passes import Pass
from mobizo_passes.passes.split_loss import batch_of
from mobizo_passes.sites.select import discover
from mobizo_passes.sites.trainable import trainable_fqns
from tests.models import Lora, integers, random, seeded

# Programs as text -------------------------------------------------------------------------------------------------


def parsed(text: str, state: Mapping[str, Tensor] | None = None) -> Ir:
    """Parse a text; `state` replaces some of the seeded values."""
    ir = parse(text)
    unknown = set(state or {}) - set(ir.state)
    assert not unknown, f"the text has no {', '.join(unknown)}"
    ir.state.update(state or {})
    return ir


def lines(text: str) -> list[str]:
    """The lines of a text, without what aligns and separates them."""
    return [re.sub(r" {2,}# ", "  # ", line.strip()) for line in text.splitlines() if line.strip()]


def values_of(ir: Ir) -> dict[str, Tensor]:
    """Values for all inputs: seeded ones, and seed 1, learning rate 0.1 and ε 0.01."""
    scalars = {"seed": torch.tensor([1]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}
    found = dict(ir.state)
    for node in ir.placeholders():
        spec, value = role(node), node.meta["val"]
        found.setdefault(spec.name, scalars.get(spec.kind, seeded_value(spec.name, value.dtype, tuple(value.shape))))
    return {**found, **scalars}


def rewritten(text: str, one: Pass, state: Mapping[str, Tensor] | None = None) -> list[str]:
    """The lines of a program after a pass that changes it and its numbers not."""
    old = parsed(text, state)
    new = old.clone()
    assert one(new) > 0
    same_numbers(old.run(values_of(old)), new.run(values_of(old)))
    return lines(to_text(new))


def left_alone(text: str, one: Pass, state: Mapping[str, Tensor] | None = None) -> None:
    """Assert that a pass changes nothing in a program."""
    ir = parsed(text, state)
    assert one(ir) == 0
    assert lines(to_text(ir, facts=True)) == lines(to_text(parsed(text), facts=True))


def same_numbers(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """Sums in another order may move the last bits."""
    assert list(new) == list(old)
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, rtol=1e-6, atol=1e-6)


class PassContract:
    """A pass's tests but for its near misses: a subclass gives the pass and the texts before and after it."""

    one: ClassVar[Pass]
    before: ClassVar[str]
    after: ClassVar[str]
    # Values that matter, among what the program holds.
    state: ClassVar[Mapping[str, Tensor]] = {}

    def run_pass(self) -> tuple[Ir, Ir]:
        old = parsed(self.before, self.state)
        new = old.clone()
        assert self.one(new) > 0
        return old, new

    def test_it_rewrites(self) -> None:
        _, new = self.run_pass()
        assert lines(to_text(new, facts=" | noise of " in self.after)) == lines(self.after)

    def test_numbers_agree(self) -> None:
        old, new = self.run_pass()
        values = values_of(old)
        self.compare(old, new, values)

    def compare(self, old: Ir, new: Ir, values: dict[str, Tensor]) -> None:
        """By default a pass changes no output."""
        same_numbers(old.run(values), new.run(values))

    def test_a_second_run_changes_nothing(self) -> None:
        _, new = self.run_pass()
        text = to_text(new, facts=True)
        assert self.one(new) == 0
        assert to_text(new, facts=True) == text

    def test_it_says_what_it_needs_and_gives(self) -> None:
        assert self.one.requires or self.one.ensures or "unmet" in vars(type(self.one))
        assert "BEFORE" in (type(self.one).__doc__ or "")
        assert "AFTER" in (type(self.one).__doc__ or "")


# Programs from models ---------------------------------------------------------------------------------------------


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

    def apply(self) -> Ir:
        """Return the rewritten copy."""
        ir = self.ir.clone()
        self.one(ir)
        return ir

    def check_numbers(self) -> None:
        """Assert that the pass changes no output."""
        same_numbers(self.ir.run(self.values), self.apply().run(self.values))


def before(kind: type[Pass], model: nn.Module, inputs: Any, loss: Any = F.cross_entropy) -> Stage:
    """Compile a seeded model up to the first pass of a kind."""
    named = name_inputs(seeded(model), inputs, loss)
    ir, _ = capture(model, named, loss)
    scalars = {"seed": torch.tensor([1]), "lr": torch.tensor([0.1]), "eps": torch.tensor([0.01])}
    values = {**ir.state, **bind_inputs(named, inputs), **scalars}
    for one in _pipeline(ir):
        if isinstance(one, kind):
            return Stage(ir, one, values)
        one(ir)
    raise LookupError(kind)


def _pipeline(ir: Ir) -> Any:
    yield from pipelines.clean()
    yield from pipelines.lift(trainable_fqns(discover(ir), "lora_B"))
    ir.set_outputs([(Output("loss", "loss"), ir.output_node("loss"))])
    ir.eliminate_dead_code()
    ir.lint()
    yield from pipelines.evaluate(None)
    yield from pipelines.step(TwoSided(1), "gaussian", batch_of(ir))
    yield from pipelines.core()


def targets(ir: Ir) -> list[str]:
    """Operators of a graph in order, as `aten.linear.default`."""
    return [str(n.target) for n in ir.graph.nodes if n.op == "call_function"]
