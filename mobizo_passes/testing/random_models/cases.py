"""A random model as source text, with its inputs and loss; and the strategy that draws them."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes.testing.random_models.parameters  # noqa: F401 (registers its blocks, after the simple ones)
from mobizo_passes.testing.drawing import st
from mobizo_passes.testing.losses import LOSSES, REGRESSION
from mobizo_passes.testing.models import Lora, integers, random, seeded
from mobizo_passes.testing.random_models import pairs
from mobizo_passes.testing.random_models.blocks import couple
from mobizo_passes.testing.random_models.builder import BLOCKS, Block, Builder, Choice, Value

CLASSES = 3
VOCABULARY = 7
FILE = "graph.py"
ALL: dict[str, Block] = {**BLOCKS, "couple": couple}
# What is trained: factors of LoRA, what is marked (here everything), all vectors, or some parameters, listed.
TRAINED = ("lora_B", "lora_A+lora_B", "requires_grad", "vectors", "listed")


@dataclass(frozen=True)
class RandomModel:
    """A random model with its inputs and its loss; its text is the module's source, as a failure shows it."""

    source: str
    batch: int
    length: int
    width: int
    tokens: bool
    second: int  # width of a second input, 0: none
    pooled: bool
    time: int  # time steps of the output
    loss: str
    seed: int
    kinds: tuple[str, ...] = field(default=(), compare=False)
    coupled: bool = False  # a perturbed value is mixed across the batch on its way to the loss

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(x.shape)) for x in self.inputs())
        loss = f"{self.loss} of {pairs.WAYS[self.way][1]}" if self.paired else self.loss
        return f"\n{self.source}\n# inputs and labels {shapes}; loss {loss}; weights of seed {self.seed}\n"

    @property
    def paired(self) -> bool:
        """The first inputs are the chosen and the rejected answers of `batch` pairs."""
        return self.loss in pairs.COMPARE

    @property
    def way(self) -> int:
        """How pairs are joined and taken apart."""
        return self.seed % len(pairs.WAYS)

    def build(self) -> nn.Module:
        """Return the model, in eval mode: at each call a new one with the same weights, LoRA-B not zero."""
        space: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "Lora": Lora}
        # Known to linecache, so that error messages and tracebacks point into this source.
        linecache.cache[FILE] = (len(self.source), None, self.source.splitlines(keepends=True), FILE)
        exec(compile(self.source, FILE, "exec"), space)
        return seeded(space["Model"](), self.seed)

    def inputs(self) -> tuple[Tensor, ...]:
        """Return example inputs, labels last: what `transform` takes."""
        shape = (self.batch, self.length)
        first = tuple(
            self._tokens(8 + i) if self.tokens else random(*shape, self.width, seed=self.seed + i)
            for i in ((1, 5) if self.paired else (1,))
        )
        more = (random(*shape, self.second, seed=self.seed + 2),) if self.second else ()
        if self.paired:
            return *first, *more, random(self.batch, seed=self.seed + 3)
        out = (self.batch,) if self.pooled else (self.batch, self.time)
        if self.loss in REGRESSION:
            return *first, *more, random(*out, CLASSES, seed=self.seed + 3)
        labels = integers(CLASSES, *out, seed=self.seed + 3)
        if self.loss == "masked":
            dropped = integers(2, *out, seed=self.seed + 4).bool()
            # At least one label must stay, or the mean is 0/0.
            dropped.view(-1)[-1] = False
            labels = labels.masked_fill(dropped, -100)
        return *first, *more, labels

    def _tokens(self, seed: int) -> Tensor:
        if "argsort" in self.source or "argmax" in self.source:
            # None twice in a row of the batch: between equal values, rounding would decide which position is chosen.
            return random(self.batch, VOCABULARY, seed=seed).argsort(1)[:, : self.length]
        return integers(VOCABULARY, self.batch, self.length, seed=seed)

    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return what `transform` takes as ``loss=``."""
        return pairs.loss_of(self.loss, self.way) if self.paired else LOSSES[self.loss]

    def trained(self, choice: str) -> str | list[str]:
        """What `trainable=` is given for one of `TRAINED`; among vectors there is always the bias of the head."""
        if choice not in ("vectors", "listed"):
            return choice
        model = self.build()
        self.loss_fn()(model(*self.inputs()[:-1]), self.inputs()[-1]).sum().backward()
        read = {name: p for name, p in model.named_parameters() if p.grad is not None}
        if choice == "vectors":
            return [name for name, p in read.items() if p.dim() < 2]
        some = [name for i, name in enumerate(read) if self.seed >> (i % 10) & 1]
        return some or list(read)

    def mixes(self, choice: str) -> bool:
        """Whether a block mixes values that hold the batch and are perturbed."""
        return self.coupled if choice.startswith("lora") else "couple" in self.kinds


def choices(kinds: list[str]) -> st.SearchStrategy[Choice]:
    return st.builds(
        Choice, kind=st.sampled_from(kinds), flavour=st.integers(0, 11), back=st.integers(0, 2),
        other=st.integers(0, 3), width=st.integers(4, 7), rank=st.integers(1, 3), lora=st.booleans(),
        bias=st.booleans(),
    )  # fmt: skip


def assemble(
    sizes: tuple[int, int, int], blocks: Sequence[Choice], head: Choice, *, tokens: bool = False, second: int = 0,
    loss: str = "mse", seed: int = 0,
) -> RandomModel:  # fmt: skip
    """The model of given blocks, for `sizes` (batch, time steps, width); of pairs if the loss is of pairs."""
    batch, length, width = sizes
    paired = loss in pairs.COMPARE
    builder = Builder(2 * batch if paired else batch, [Value("y", "btd", length, second)] if second else [])
    if paired:
        join, _, _ = pairs.WAYS[seed % len(pairs.WAYS)]
        builder.lines.append(f"x = {join.format(a='chosen', b='rejected')}")
        if second:
            builder.lines.append(f"y = {join.format(a='y', b='y')}")
    if tokens:
        table = builder.define("embed", f"nn.Embedding({VOCABULARY}, {width})")
        builder.lines.append(f"x = {table}({'x' if paired else 'tokens'})")
    builder.values.append(Value("x", "btd", length, width))
    builder.add(ALL, blocks)
    last = builder.values[-1]
    if last.layout == "rows":
        last = builder.emit(f"{last.name}.reshape({builder.batch}, {last.time}, {last.width})", last, layout="btd")
    elif last.layout == "tbd":
        last = builder.emit(f"{last.name}.transpose(0, 1)", last, layout="btd")
    with_lora = head.lora or not last.perturbed
    layer = f"Lora({last.width}, {CLASSES}, 1)" if with_lora else f"nn.Linear({last.width}, {CLASSES})"
    builder.init.append(f"self.head = {layer}")
    arguments = "chosen, rejected" if paired else "tokens" if tokens else "x"
    arguments += ", y" if second else ""
    source = "\n".join(
        [
            "class Model(nn.Module):", "    def __init__(self):", "        super().__init__()",
            *(f"        {line}" for line in builder.init), "", f"    def forward(self, {arguments}):",
            *(f"        {line}" for line in builder.lines), f"        return self.head({last.name})",
        ]
    )  # fmt: skip
    return RandomModel(
        source, batch, length, width, tokens, second, last.layout == "bd", last.time, loss, seed,
        tuple(builder.kinds), last.coupled,
    )  # fmt: skip


@st.composite
def random_models(draw: st.DrawFn, coupling: int | None = None, most: int = 6) -> RandomModel:
    """Random models with LoRA on the way to the loss, as `RandomModel`s.

    Each has up to `most` blocks beside one of LoRA: linear layers, norms, attention, convolutions, recurrences,
    experts, gathers, adapters other than LoRA. One in ten mixes the examples of the batch, which `transform` has to
    refuse: its `coupled` says so. With `coupling` all do, in the way of that number.
    """
    batch, length, width = draw(st.integers(2, 4)), draw(st.integers(2, 5)), draw(st.integers(4, 7))
    tokens, second = draw(st.booleans()), draw(st.sampled_from([0, 0, 4, width]))
    blocks = draw(st.lists(choices(list(BLOCKS)), max_size=most))
    # One LoRA block at least, in front of most others: what no perturbed value reaches tests little.
    blocks.insert(draw(st.integers(0, len(blocks) // 2)), draw(choices(["lora"])))
    if coupling is not None or draw(st.integers(0, 9)) == 9:
        # Last, or next to last: in front of the LoRA block it would couple nothing that is perturbed.
        mixing = draw(choices(["couple"]))
        mixing = mixing if coupling is None else replace(mixing, flavour=coupling)
        blocks.insert(draw(st.integers(len(blocks) - 1, len(blocks))), mixing)
    head = draw(choices(["head"]))
    loss, seed = draw(st.sampled_from([*LOSSES, *pairs.COMPARE])), draw(st.integers(0, 1000))
    return assemble((batch, length, width), blocks, head, tokens=tokens, second=second, loss=loss, seed=seed)
