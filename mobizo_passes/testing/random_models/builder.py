"""Turns a list of choices into the source of an `nn.Module`, one line of `forward` per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Choice:
    """One block before it meets a graph; numbers are read modulo what is possible where the block lands."""

    kind: str
    flavour: int = 0
    back: int = 0  # which value it takes: 0 is the latest
    other: int = 0  # which second value of the same shape
    width: int = 4
    rank: int = 1
    lora: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Value:
    """A variable of `forward`. Layouts: btd [B, T, D], tbd [T, B, D], rows [B*T, D], bd [B, D]."""

    name: str
    layout: str
    time: int
    width: int
    perturbed: bool = False
    coupled: bool = False  # a perturbed value went through a block that mixes the examples of the batch

    @property
    def shape(self) -> tuple[str, int, int]:
        return self.layout, self.time, self.width


@dataclass
class Builder:
    """The module so far. A block calls `emit` once, or returns without it if nothing fits."""

    batch: int
    values: list[Value]
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    modules: list[tuple[str, int, int, bool]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    count: int = 0

    def pick(self, choice: Choice, *layouts: str, least: int = 1) -> Value | None:
        """The `back`-th latest value in one of the layouts with at least `least` time steps."""
        found = [v for v in self.values if (not layouts or v.layout in layouts) and v.time >= least]
        return found[-1 - choice.back % len(found)] if found else None

    def partner(self, value: Value, choice: Choice) -> Value:
        """A value of the same shape, possibly itself."""
        found = [v for v in self.values if v.shape == value.shape]
        return found[-1 - choice.other % len(found)]

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def define(self, prefix: str, module: str) -> str:
        name = self.fresh(prefix)
        self.init.append(f"self.{name} = {module}")
        return f"self.{name}"

    def emit(
        self, expression: str, *sources: Value, width: int | None = None, time: int | None = None,
        layout: str | None = None, perturbs: bool = False, couples: bool = False,
    ) -> Value:  # fmt: skip
        """Append ``xN = expression``; sizes not given are those of the first source."""
        first = sources[0]
        perturbed = any(v.perturbed for v in sources)
        value = replace(
            first,
            name=self.fresh("x"),
            width=first.width if width is None else width,
            time=first.time if time is None else time,
            layout=layout or first.layout,
            perturbed=perturbed or perturbs,
            coupled=any(v.coupled for v in sources) or (couples and perturbed),
        )
        self.lines.append(f"{value.name} = {expression}")
        self.values.append(value)
        return value

    def let(self, expression: str) -> str:
        """Append a line for a value that no other block takes; returns its variable."""
        name = self.fresh("t")
        self.lines.append(f"{name} = {expression}")
        return name

    def affine(self, fan_in: int, fan_out: int, choice: Choice) -> str:
        """A linear layer, with LoRA if the choice says so; returns its attribute."""
        if choice.lora:
            name = self.define("lora", f"Lora({fan_in}, {fan_out}, {choice.rank}, bias={choice.bias})")
        else:
            name = self.define("linear", f"nn.Linear({fan_in}, {fan_out}, bias={choice.bias})")
        self.modules.append((name, fan_in, fan_out, choice.lora))
        return name

    def add(self, blocks: dict[str, Callable[[Builder, Choice], None]], choices: Sequence[Choice]) -> None:
        """Apply choices in order; those that fit nowhere leave no trace."""
        for choice in choices:
            before = len(self.lines)
            blocks[choice.kind](self, choice)
            if len(self.lines) > before:
                self.kinds.append(choice.kind)


Block = Callable[[Builder, Choice], None]
BLOCKS: dict[str, Block] = {}
# Where the batch lies, and where time lies, in each layout.
BATCH_DIM = {"btd": 0, "tbd": 1, "rows": 0, "bd": 0}
TIME_DIM = {"btd": 1, "tbd": 0}


def block(fn: Block) -> Block:
    BLOCKS[fn.__name__] = fn
    return fn


def flavour(choice: Choice, options: Sequence[str]) -> str:
    return options[choice.flavour % len(options)]


def latest(b: Builder, c: Choice) -> Value:
    """Any value: every layout has features last."""
    value = b.pick(c)
    assert value is not None  # the inputs are there from the start
    return value
