"""One training step of each kind of contender, on whatever batch comes next.

The eager ones are what one would write without a compiler, in their fastest form that we know: logits at the last
position only, and no gradient below the lowest LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from benchmarks.learning.contenders import Contender, lora_model

if TYPE_CHECKING:
    from torch import Tensor

    Batch = Mapping[str, Tensor]


class Learner(Protocol):
    """Something with an adapter that a step improves."""

    def step(self, number: int, batch: Batch) -> float:
        """Do step `number`; returns the loss at (or around) the adapter it started from."""
        ...

    def adapter(self) -> dict[str, Tensor]:
        """All LoRA tensors by FQN, trained or not."""
        ...


class Compiled:
    """A program on ExecuTorch. No transformers, no compiler: the peak memory is that of a training device.

    The method is loaded, and its weights packed, in the first step.
    """

    def __init__(self, contender: Contender, learning_rate: float, seed: int, program: Path, threads: int) -> None:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        import runtime_driver

        self.session = runtime_driver.Session(program)
        # ExecuTorch's pool has a thread a core, whatever OMP_NUM_THREADS says; an idle one spins, and costs CPU time.
        _unsafe_reset_threadpool(threads)
        self.seed, self.learning_rate, self.eps = seed, learning_rate, contender.eps
        self.draws = contender.queries > 0

    def step(self, number: int, batch: Batch) -> float:
        import runtime_driver

        seed = runtime_driver.step_seed(self.seed, number) if self.draws else None
        return self.session.step(batch, seed=seed, lr=self.learning_rate, eps=self.eps).loss

    def adapter(self) -> dict[str, Tensor]:
        return {**self.session.adapter, **self.session.frozen_adapter}


class Eager:
    """A PEFT model in PyTorch, and its loss over the task's words."""

    def __init__(self, contender: Contender, word_ids: list[int]) -> None:
        self.model = lora_model()
        self.word_ids = word_ids
        names = tuple(contender.trainable.split("+"))
        self.trained = [p for name, p in self.model.named_parameters() if any(part in name for part in names)]

    def loss(self, batch: Batch) -> Tensor:
        import torch.nn.functional as F

        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1, self.word_ids], batch["label"])

    def adapter(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if "lora_" in name}


class Backpropagation(Eager):
    """LoRA + AdamW."""

    def __init__(self, contender: Contender, learning_rate: float, word_ids: list[int]) -> None:
        import torch

        super().__init__(contender, word_ids)
        for parameter in self.trained:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate)

    def step(self, number: int, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class MeZO(Eager):
    """Two forwards per query; the adapter is perturbed in place, and noise comes again from its seed."""

    def __init__(self, contender: Contender, learning_rate: float, word_ids: list[int], seed: int) -> None:
        super().__init__(contender, word_ids)
        assert contender.eps is not None
        self.learning_rate, self.eps, self.queries = learning_rate, contender.eps, contender.queries
        self.seed = seed

    def step(self, number: int, batch: Batch) -> float:
        import torch

        with torch.no_grad():
            seeds = [(self.seed * 1_000_000 + number) * self.queries + query for query in range(self.queries)]
            gradients: list[float] = []
            total = 0.0
            for seed in seeds:
                self._add_noise(seed, self.eps)
                plus = float(self.loss(batch))
                self._add_noise(seed, -2 * self.eps)
                minus = float(self.loss(batch))
                self._add_noise(seed, self.eps)
                gradients.append((plus - minus) / (2 * self.eps))
                total += plus + minus
            for seed, gradient in zip(seeds, gradients, strict=True):
                self._add_noise(seed, -self.learning_rate * gradient / self.queries)
        return total / (2 * self.queries)

    def _add_noise(self, seed: int, scale: float) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        for parameter in self.trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def make_learner(
    contender: Contender, learning_rate: float, word_ids: list[int], seed: int, program: Path | None, threads: int
) -> Learner:
    """The contender, ready for its first step; a compiled one needs its `program`."""
    if program is not None:
        return Compiled(contender, learning_rate, seed, program, threads)
    if contender.queries:
        return MeZO(contender, learning_rate, word_ids, seed)
    return Backpropagation(contender, learning_rate, word_ids)
