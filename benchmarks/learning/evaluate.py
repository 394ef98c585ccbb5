"""Accuracy of adapters, measured for every contender by the same eager model.

The layers below the lowest LoRA give the same for every adapter: they are computed once for each set of sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.learning.contenders import UPPER_LAYERS, lora_model
from benchmarks.learning.tasks import TASKS

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

ROWS = 25


def lower_layers(layers: int) -> int:
    """How many of a model's layers have no LoRA."""
    return max(0, layers - UPPER_LAYERS)


@cache
def upper_half() -> PeftModel:
    """The model with LoRA, whose lower layers hand on what they are given."""
    from torch import nn

    class HandOn(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    model = lora_model()
    layers = model.get_submodule("base_model.model.model.layers")
    for place in range(lower_layers(len(list(layers.children())))):
        setattr(layers, str(place), HandOn())
    return model


@cache
def lower_half(task: str, part: str, size: int) -> list[dict[str, Tensor]]:
    """What the lower layers give for batches of these sentences: `inputs_embeds`, `attention_mask` and `label`.

    Sentences are sorted by length, and padding that all of a batch have is left out.
    """
    import torch
    from torch import nn

    from examples.packaged import load_model

    model = load_model().model
    model.layers = model.layers[: lower_layers(len(model.layers))]
    model.config.num_hidden_layers = len(model.layers)
    model.set_submodule("norm", nn.Identity())
    examples = getattr(TASKS[task].split(), part)[:size]
    whole = TASKS[task].batches(examples, size)[0]
    order = whole["attention_mask"].sum(1).argsort()
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for rows in order.split(ROWS):
            label, mask = whole["label"][rows], whole["attention_mask"][rows]
            longest = int(mask.sum(1).max())
            mask = mask[:, -longest:]
            hidden = model(input_ids=whole["input_ids"][rows, -longest:], attention_mask=mask).last_hidden_state
            found.append({"inputs_embeds": hidden, "attention_mask": mask, "label": label})
    return found


def accuracies(task: str, part: str, size: int, adapters: Sequence[Path | None], threads: int) -> list[float]:
    """Share of the first `size` sentences of that part of the task that each adapter gets right.

    None stands for the adapter that all start from. Runs in a worker process, which keeps model and hidden states.
    """
    import torch

    torch.set_num_threads(threads)
    return [_untrained(task, part, size) if a is None else _accuracy(task, part, size, a) for a in adapters]


@cache
def _untrained(task: str, part: str, size: int) -> float:
    return _accuracy(task, part, size, None)


def _accuracy(task: str, part: str, size: int, adapter: Path | None) -> float:
    import torch
    from safetensors.torch import load_file

    model, batches = upper_half(), lower_half(task, part, size)
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    if adapter is None:
        # lora_B starts at zero, so lora_A does not matter.
        state = {name: torch.zeros_like(p) for name, p in own.items()}
    else:
        state = load_file(adapter)
    if state.keys() != own.keys():
        raise ValueError(f"{adapter}: expected the tensors {sorted(own)}, found {sorted(state)}")
    model.load_state_dict(state, strict=False)
    ids = list(TASKS[task].encoder().label_ids)
    body, head = model.get_submodule("base_model.model.model"), model.get_submodule("base_model.model.lm_head")
    # Of the logits, those of the task's words alone: the others would be a fifth of the work.
    words = head.get_parameter("weight")[ids]
    right = 0
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name] for name in ("inputs_embeds", "attention_mask")}
            logits = body(**inputs).last_hidden_state[:, -1] @ words.T
            right += int((logits.argmax(-1) == batch["label"]).sum())
    return right / sum(len(batch["label"]) for batch in batches)
