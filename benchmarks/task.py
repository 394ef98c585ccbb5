"""The one task every contender of `step_time.py` works on, and how a contender talks to the parent."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

LAYERS = 30
LEARNING_RATE = 2e-3
EXACT_LEARNING_RATE = 1e-4
EPSILON = 1e-2
IGNORED = -100


@dataclass(frozen=True)
class Task:
    """Shape of one training step on SmolLM2-135M: LoRA on q_proj and v_proj, one label, on the last token."""

    queries: int = 4
    batch: int = 4
    tokens: int = 64
    rank: int = 16


class Contender(Protocol):
    """One way of doing a training step; lives alone in its own process."""

    def step(self, number: int) -> float:
        """Do step `number` on the task's batch and return the loss at (or around) the current adapter."""
        ...


def make_batch(task: Task) -> dict[str, Tensor]:
    """The batch: `input_ids` and `attention_mask` int64[batch, tokens], `labels` int64 the same, one kept per row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(100, 40_000, (task.batch, task.tokens), generator=generator)
    labels = torch.full_like(input_ids, IGNORED)
    labels[:, -1] = input_ids[:, -1]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def load_lora_model(task: Task, upper_layers: int = LAYERS, layers: int = LAYERS) -> PeftModel:
    """SmolLM2-135M with a PEFT LoRA on the `upper_layers` last layers, everything frozen, in eval mode.

    Of a model cut off after its first `layers`, all of these have it.
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    from examples.packaged import load_model

    torch.manual_seed(0)
    base = load_model()
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = layers = len(base.model.layers)
    model = get_peft_model(
        base,
        LoraConfig(
            r=task.rank,
            lora_alpha=2 * task.rank,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=list(range(max(0, layers - upper_layers), layers)),
        ),
    )
    assert isinstance(model, PeftModel)
    return model.eval().requires_grad_(False)


def peak_memory() -> int:
    """Peak resident set of this process, in bytes.

    Read from VmHWM, which starts anew at `exec`; `getrusage` would hand down the peak of whoever started us.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; the benchmark needs Linux")


def serve(contender: Contender) -> None:
    """Do a step per line read from standard input; answer each with one line of JSON. Ends with the input."""
    import time

    answer = sys.stdout
    # Whatever a library prints goes to standard error: standard output carries answers only.
    sys.stdout = sys.stderr
    print(json.dumps({"ready": True, "peak_bytes": peak_memory()}), file=answer, flush=True)
    for number, _ in enumerate(sys.stdin):
        start, busy = time.perf_counter(), time.process_time()
        loss = contender.step(number)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
        told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss, "peak_bytes": peak_memory()}
        print(json.dumps(told), file=answer, flush=True)
