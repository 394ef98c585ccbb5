"""Who trains, with which settings. A further contender is one entry of `CONTENDERS`.

LoRA is that of the demo for all: rank 16 on `q_proj` and `v_proj` of the upper 15 of 30 layers, logits at the last
position only, cross-entropy over the task's words. Learning rates can be compared by

    python benchmarks/time_to_accuracy.py --search

which trains each for a short budget on another seed and compares accuracy on sentences kept for that. With 40 CPU
seconds and 200 sentences of `sentiment`, the exact gradient with AdamW came from 0.515 to 0.700 at 2e-4, 0.775 at 5e-4
and 0.760 at 1e-3. Backprop in eager mode is the same mathematics and has the same rate. Two-sided differences did not
learn in that time (0.520 at 3e-3); they, MeZO and directional derivatives have the demo's rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.learning.tasks import BATCH, Task
from benchmarks.task import Task as StepTask
from benchmarks.task import load_lora_model

if TYPE_CHECKING:
    from peft import PeftModel

    import mobizo_passes as mz

RANK, UPPER_LAYERS = 16, 15
BOTH = "lora_A+lora_B"
ZEROTH_ORDER_RATES = (3e-3, 1e-2, 3e-2)
ADAMW_RATES = (2e-4, 5e-4, 1e-3)


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        engine: a program on ExecuTorch, or PyTorch's eager mode.
        estimator: the kind of a registered estimator; in eager mode ``two_sided`` (MeZO) or ``exact`` (backprop).
        queries: perturbations in a step; 0 for exact gradients.
        eps: radius of the perturbation; None where nothing is perturbed.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: of both tasks; `learning_rates` are the candidates that `--search` compares.
    """

    name: str
    what: str
    engine: Literal["executorch", "eager"]
    estimator: str
    learning_rate: float
    learning_rates: tuple[float, ...]
    queries: int = 0
    eps: float | None = None
    optimizer: str = "sgd"
    trainable: str = "lora_B"

    def settings(self) -> Mapping[str, object]:
        """What decides how it learns."""
        names = ("engine", "estimator", "queries", "eps", "optimizer", "trainable")
        return {name: getattr(self, name) for name in names}

    def program(self, task: Task) -> mz.TrainingProgram:
        """The training-step program of a compiled contender."""
        import torch.nn.functional as F

        import mobizo_passes as mz
        from mobizo_passes.zo.estimators import estimator_kinds
        from mobizo_passes.zo.optimizers import OPTIMIZERS

        ids = list(task.encoder().label_ids)

        def loss(outputs: Any, label: Any) -> Any:
            return F.cross_entropy(outputs.logits[:, -1, ids], label)

        inputs = {**task.batches(task.split().train[:BATCH])[0], "logits_to_keep": 1}
        kind = estimator_kinds()[self.estimator]
        estimator = kind(queries=self.queries) if self.queries else kind()
        optimizer = OPTIMIZERS[self.optimizer]()
        return mz.transform(
            lora_model(), inputs, estimator=estimator, optimizer=optimizer, trainable=self.trainable, loss=loss
        )


def lora_model() -> PeftModel:
    """SmolLM2-135M with the demo's LoRA, the same at every call, everything frozen, in eval mode."""
    return load_lora_model(StepTask(rank=RANK), UPPER_LAYERS)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "exact",
            "compiled exact gradient, AdamW",
            "executorch",
            "exact",
            5e-4,
            ADAMW_RATES,
            optimizer="adamw",
            trainable=BOTH,
        ),
        Contender(
            "two-sided",
            "compiled two-sided differences, q = 4",
            "executorch",
            "two_sided",
            1e-2,
            ZEROTH_ORDER_RATES,
            queries=4,
            eps=1e-2,
        ),
        Contender(
            "forward-gradient",
            "compiled directional derivatives, q = 4",
            "executorch",
            "forward_gradient",
            1e-2,
            ZEROTH_ORDER_RATES,
            queries=4,
        ),
        Contender(
            "backprop-eager",
            "LoRA + AdamW by backprop, PyTorch eager",
            "eager",
            "exact",
            5e-4,
            ADAMW_RATES,
            optimizer="adamw",
            trainable=BOTH,
        ),
        Contender(
            "mezo-eager",
            "MeZO, q = 4, PyTorch eager",
            "eager",
            "two_sided",
            1e-2,
            ZEROTH_ORDER_RATES,
            queries=4,
            eps=1e-2,
        ),
    )
}
