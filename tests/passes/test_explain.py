"""An export that fails says which line of the model, what is data-dependent there, and what to write instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobizo_passes as mz
from mobizo_passes.capture.known import change_for
from tests.models import BATCH, Lora, Mlp, integers, random, seeded

Body = Callable[[Tensor], Tensor]


class Around(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.layer, self.head, self.body = Lora(6, 8), nn.Linear(8, 4), body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.layer(x)))


def decides(h: Tensor) -> Tensor:
    if h.sum() > 0:
        return h
    return -h


def loops(h: Tensor) -> Tensor:
    while h.norm() > 1:
        h = h / 2
    return h


def asserts(h: Tensor) -> Tensor:
    assert h.abs().max() < 100
    return h


def of_experts(h: Tensor) -> Tensor:
    out, expert_hit = torch.zeros_like(h), (h.sum(0) > 0).nonzero()
    for expert in expert_hit:
        out = out + h * expert
    return out


CASES: dict[str, tuple[Body, str, str]] = {
    "if": (decides, r"in decides: if h\.sum\(\) > 0:", "torch.where"),
    "while": (loops, r"in loops: while h\.norm\(\) > 1:", "fixed number of rounds"),
    "assert": (asserts, r"in asserts: assert h", "only guards can be left out"),
    "experts that were hit": (of_experts, r"in of_experts: for expert in expert_hit", "multiply by its gate"),
    "a choice in an expression": (lambda h: h if h.mean() > 0 else -h, r"if h\.mean\(\) > 0", "torch.where"),
    "item for a size": (lambda h: h * (int(h.argmax().item()) % 3), r"argmax\(\)\.item\(\)", "keep it a tensor"),
    "item in arithmetic": (lambda h: h * h.sum().item(), r"aten\.item\.default in module", "keep it a tensor"),
    "tolist": (lambda h: h * sum(h.sum(0).tolist()), "aten.item.default", "keep it a tensor"),
    "print of a number": (lambda h: h if print(float(h.sum())) is None else -h, "float", "keep it|torch.where"),
    "nonzero": (lambda h: h + h.sum(1).nonzero().sum(), r"%nonzero = aten\.nonzero\.default", "topk or cumsum"),
    "boolean index": (lambda h: h + h[h > 0].sum(), r"%index = aten\.index\.Tensor", "torch.where"),
    "cond": (
        lambda h: torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,)),
        r"higher-order operator .*torch\.cond", "torch.where",
    ),
    "unique": (lambda h: h + h.round().unique().sum(), "aten._unique2", "fixed"),
    "numpy": (lambda h: h + torch.from_numpy(np.tanh(h.detach().numpy())), r"np\.tanh", "the torch function"),
    "a name of the model's own": (lambda h: mysterious(h), "NameError: name 'mysterious'", "mysterious"),  # type: ignore[name-defined]  # noqa: F821
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_line_and_what_to_do(name: str) -> None:
    body, where, advice = CASES[name]
    with pytest.raises(mz.CaptureError, match=where) as caught:
        mz.transform(seeded(Around(body)), (random(BATCH, 6), integers(4, BATCH)), loss=F.cross_entropy)
    text = str(caught.value)
    assert any(word in text for word in advice.split("|"))
    assert "test_explain.py, line" in text
    assert len(text.splitlines()) <= 3
    assert all(word not in text for word in ("u0", "TORCH_LOGS", "file an issue", "model.eval()"))


def test_packed_sequences() -> None:
    line = "packed = pack_padded_sequence(x, lengths, batch_first=True)"
    assert "take each example's last step by gather" in change_for("model.py", line)


def test_a_check_on_a_number_is_dropped() -> None:
    def body(h: Tensor) -> Tensor:
        length = (h != 0).sum(1).max().item()
        torch._check(length < 100)
        return h

    model, inputs = seeded(Around(body)), (random(BATCH, 6), integers(4, BATCH))
    mz.verify(mz.transform(model, inputs, loss=F.cross_entropy), model, inputs)


def test_ctc_is_refused_by_name() -> None:
    def loss(o: Tensor, y: Tensor, n: Tensor, k: Tensor) -> Tensor:
        return F.ctc_loss(F.log_softmax(o, -1).transpose(0, 1), y, n, k)

    inputs = (random(3, 9, 6), integers(3, 3, 2) + 1, torch.tensor([9, 8, 9]), torch.tensor([2, 2, 1]))
    with pytest.raises(mz.CaptureError, match=r"CTC loss is not supported: .*\n  at test_explain.py, line \d+"):
        mz.transform(seeded(Mlp()), inputs, loss=loss)


def test_dropout_left_on_in_eval_mode_does_not_ask_for_eval_mode() -> None:
    with pytest.raises(mz.CaptureError, match=r"is in eval mode, but draws .* training=self.training"):
        mz.transform(seeded(Around(F.dropout)), (random(BATCH, 6), integers(4, BATCH)), loss=F.cross_entropy)


def test_a_buffer_written_in_eval_mode_does_not_ask_for_eval_mode() -> None:
    class Counts(Mlp):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return super().forward(x)

    with pytest.raises(mz.CaptureError, match=r"changes its own state 'seen'.*though it is in eval mode: %add = "):
        mz.transform(seeded(Counts()), (random(BATCH, 6), integers(4, BATCH)), loss=F.cross_entropy)


def growing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As transformers' `dynamic_rope_update`: frequencies are recomputed when positions go beyond what they know."""

    @functools.wraps(forward)
    def wrapper(self: Any, x: Tensor, positions: Tensor) -> Tensor:
        length = torch.max(positions) + 1
        if self.rope_type == "dynamic":
            if length > self.known:
                self.register_buffer("inv_freq", self.original / length, persistent=False)
                self.known = length
        else:
            self.inv_freq.copy_(torch.where(length > self.known, self.original / 8, self.original))
        return forward(self, x, positions)

    return wrapper


class Rope(nn.Module):
    inv_freq: Tensor

    def __init__(self, rope_type: str, known: int) -> None:
        super().__init__()
        self.rope_type, self.known, self.original = rope_type, known, torch.tensor([1.0, 0.3, 0.1])
        self.register_buffer("inv_freq", self.original.clone(), persistent=False)

    @torch.no_grad()
    @growing
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return (positions[..., None] * self.inv_freq).repeat(1, 1, 2).cos()


class Rotary(nn.Module):
    def __init__(self, rope_type: str, known: int) -> None:
        super().__init__()
        self.rope, self.layer, self.head = Rope(rope_type, known), Lora(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        return self.head(self.layer(x * self.rope(x, positions)).mean(1))


@pytest.mark.parametrize("known", [3, 16])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_held(rope_type: str, known: int) -> None:
    model, inputs = seeded(Rotary(rope_type, known)), (random(BATCH, 5, 6), integers(4, BATCH))
    rope: Any = model.rope
    attributes, buffer = set(rope.__dict__), rope.inv_freq
    program = mz.transform(model, inputs, loss=F.cross_entropy)
    assert (program.history[0].name, program.history[0].rewrites) == ("freeze-rope", 1)
    assert set(rope.__dict__) == attributes
    assert rope.inv_freq is buffer
    assert torch.equal(buffer, rope.original)
    mz.verify(program, model, inputs)
