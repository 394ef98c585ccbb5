"""A model of your own, with LoRA of your own: no Hugging Face, no PEFT, no naming convention, no delegate.

A small classifier whose second layer carries a low-rank update written by hand. The compiler finds
it by structure: two matrices in sequence through a narrow middle, added to another path. Lowered to ExecuTorch's
portable kernels, so the .pte runs wherever ExecuTorch does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowering
import mobizo_passes as mz
import runtime_driver

FEATURES, HIDDEN, CLASSES, RANK, BATCH = 16, 32, 3, 4, 8


class TiltedLinear(nn.Module):
    """A frozen linear layer plus `squeeze` then `stretch`: a LoRA that nobody told the compiler about."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs)
        self.squeeze = nn.Linear(inputs, RANK, bias=False)
        self.stretch = nn.Linear(RANK, outputs, bias=False)
        nn.init.zeros_(self.stretch.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + 2.0 * self.stretch(self.squeeze(x))


class Classifier(nn.Module):
    """float32[batch, FEATURES] to logits float32[batch, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.second = TiltedLinear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(x)))))


def make_batches(count: int) -> list[dict[str, Tensor]]:
    """Points around three centres; the label is the center."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    batches = []
    for _ in range(count):
        label = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, FEATURES, generator=generator)
        batches.append({"x": centres[label] + 0.5 * noise, "label": label})
    return batches


def main() -> None:
    torch.manual_seed(0)
    model = Classifier().eval()
    data = make_batches(40)
    program = mz.transform(
        model, data[0], estimator=mz.TwoSided(queries=8), loss=lambda logits, label: F.cross_entropy(logits, label)
    )
    for site in program.sites:
        print(f"found {site.name}: {site.lora_A} then {site.lora_B}, rank {site.rank}, scaling {site.scaling}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "classifier.pte"
        lowering.lower(program, target="portable").save(path)
        session = runtime_driver.Session(path)
        before = session.evaluate(data, label_ids=range(CLASSES))
        session.fit(data, steps=400, lr=0.5, eps=1e-2, seed=0, progress=False)
        after = session.evaluate(data, label_ids=range(CLASSES))
    print(f"loss {before.loss:.3f} -> {after.loss:.3f}, accuracy {before.accuracy:.2f} -> {after.accuracy:.2f}")


if __name__ == "__main__":
    main()
