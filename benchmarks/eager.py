"""The eager PyTorch contenders: what one would write without a compiler, each as its authors describe it.

All of them call the Hugging Face model with `labels=`, and so compute logits at every position; `MeZOLabelOnly` keeps
just the labelled one, which is the one trick of ours that is as easy in eager code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.task import EPSILON, EXACT_LEARNING_RATE, LAYERS, LEARNING_RATE, Task, load_lora_model, make_batch

if TYPE_CHECKING:
    from peft import PeftModel


class MeZO:
    """Two sequential forwards per query; the adapter is perturbed in place, noise comes again from its seed."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batch = make_batch(task)
        self.model: PeftModel = load_lora_model(task)
        self.adapter = [p for name, p in self.model.named_parameters() if "lora_B" in name]

    def loss(self) -> float:
        return float(self.model(**self.batch).loss)

    def _add_noise(self, seed: int, scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.adapter:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    @torch.no_grad()
    def step(self, number: int) -> float:
        queries = self.task.queries
        gradients: list[float] = []
        total = 0.0
        for query in range(queries):
            seed = number * queries + query
            self._add_noise(seed, EPSILON)
            plus = self.loss()
            self._add_noise(seed, -2 * EPSILON)
            minus = self.loss()
            self._add_noise(seed, EPSILON)
            gradients.append((plus - minus) / (2 * EPSILON))
            total += plus + minus
        for query, gradient in enumerate(gradients):
            self._add_noise(number * queries + query, -LEARNING_RATE * gradient / queries)
        return total / (2 * queries)


class MeZOLabelOnly(MeZO):
    """MeZO whose forward computes logits at the one position that predicts the label."""

    def loss(self) -> float:
        # The causal shift: the last label is predicted at the last position but one.
        out = self.model(
            input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"], logits_to_keep=2
        )
        return float(F.cross_entropy(out.logits[:, 0], self.batch["labels"][:, -1]))


class GroupedLoRA(nn.Module):
    """A linear layer whose LoRA-B differs from group to group of its batch: the paper's MP-LoRA."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, scaling: float, groups: int) -> None:
        super().__init__()
        self.base, self.lora_a, self.scaling, self.groups = base, lora_a, scaling, groups
        self.lora_b = torch.zeros(base.out_features, lora_a.shape[0])
        self.perturbed_b = self.lora_b.expand(groups, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a).unflatten(0, (self.groups, -1))
        delta = torch.einsum("pbtr,por->pbto", low, self.perturbed_b).flatten(0, 1)
        return self.base(x) + self.scaling * delta


class MPLoRA:
    """The paper's step: inputs repeated 2q times, one forward, grouped LoRA-B, logits at every position."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.groups = 2 * task.queries
        batch = make_batch(task)
        self.inputs = {name: batch[name].repeat(self.groups, 1) for name in ("input_ids", "attention_mask")}
        self.labels = batch["labels"].repeat(self.groups, 1)
        peft = load_lora_model(task)
        self.model = peft.get_base_model()
        self.sites = list(self._replace_sites(self.model))

    def _replace_sites(self, model: nn.Module) -> Iterator[GroupedLoRA]:
        from peft.tuners.lora import Linear

        for name, module in list(model.named_modules()):
            if isinstance(module, Linear):
                parent_name, _, child = name.rpartition(".")
                base, lora_a = module.base_layer, module.lora_A["default"]
                assert isinstance(base, nn.Linear)
                assert isinstance(lora_a, nn.Linear)
                site = GroupedLoRA(base, lora_a.weight, module.scaling["default"], self.groups)
                setattr(model.get_submodule(parent_name), child, site)
                yield site

    @torch.no_grad()
    def step(self, number: int) -> float:
        queries = self.task.queries
        generator = torch.Generator().manual_seed(number)
        noise = [torch.randn(queries, *site.lora_b.shape, generator=generator) for site in self.sites]
        for site, z in zip(self.sites, noise, strict=True):
            site.perturbed_b = torch.cat([site.lora_b + EPSILON * z, site.lora_b - EPSILON * z])
        logits = self.model(**self.inputs).logits
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten(), reduction="none"
        ).unflatten(0, (self.groups, -1))
        per_group = losses.sum(1) / self.task.batch
        gradients = (per_group[:queries] - per_group[queries:]) / (2 * EPSILON)
        for site, z in zip(self.sites, noise, strict=True):
            site.lora_b = site.lora_b - LEARNING_RATE / queries * torch.einsum("q,qor->or", gradients, z)
        return float(per_group.mean())


class Backpropagation:
    """LoRA + AdamW: what a machine with a backward pass does. Trains lora_A and lora_B, as is usual."""

    def __init__(self, task: Task, upper_layers: int = LAYERS) -> None:
        self.batch = make_batch(task)
        self.model = load_lora_model(task, upper_layers)
        adapter = [p.requires_grad_(True) for name, p in self.model.named_parameters() if "lora_" in name]
        self.optimizer = torch.optim.AdamW(adapter, lr=EXACT_LEARNING_RATE)

    def loss(self) -> Tensor:
        return self.model(**self.batch).loss

    def step(self, number: int) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class BackpropagationCheckpointed(Backpropagation):
    """The same with activation checkpointing: the backward computes each layer's forward again from its input."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # Checkpoints are for training alone; there is no dropout that this would switch on.
        self.model.train()
        self.model.gradient_checkpointing_enable({"use_reentrant": False})


class BackpropagationLabelOnly(Backpropagation):
    """The same with logits at the one position that predicts the label: the fastest eager form that we know."""

    def loss(self) -> Tensor:
        out = self.model(
            input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"], logits_to_keep=2
        )
        return F.cross_entropy(out.logits[:, 0], self.batch["labels"][:, -1])


CONTENDERS = {
    "mezo-eager": MeZO,
    "mezo-eager-label-only": MeZOLabelOnly,
    "mp-lora-eager": MPLoRA,
    "backprop-eager": Backpropagation,
    "backprop-eager-checkpointed": BackpropagationCheckpointed,
    "backprop-eager-label-only": BackpropagationLabelOnly,
    "backprop-eager-label-only-upper": lambda task: BackpropagationLabelOnly(task, LAYERS // 2),
}
