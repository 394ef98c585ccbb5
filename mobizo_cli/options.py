"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from mobizo_cli.errors import OptionError
from mobizo_cli.task import LossKind, check_text, parse_layers

_LORA, _TASK, _STEP = "LoRA", "Task", "Training step"

ModelArgument = Annotated[
    str, typer.Argument(help="A model's hub name, or a local directory: a transformers model or a PEFT adapter.")
]
ProgramArgument = Annotated[Path, typer.Argument(help="A .pte written by `mobizo lower`.")]
Rank = Annotated[int | None, typer.Option(min=1, help="LoRA rank. [default: 16]", rich_help_panel=_LORA)]
Alpha = Annotated[float | None, typer.Option(help="LoRA alpha, above 0. [default: 2 x rank]", rich_help_panel=_LORA)]
TargetModules = Annotated[
    str | None,
    typer.Option(help="Modules that get a LoRA, comma-separated. [default: q_proj,v_proj]", rich_help_panel=_LORA),
]
Layers = Annotated[
    str | None, typer.Option(help="Layers that get a LoRA, e.g. 15-29. [default: all]", rich_help_panel=_LORA)
]
InitSeed = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Seed of lora_A's initial values, and of --new-weights.", rich_help_panel=_LORA
    ),
]
NewWeights = Annotated[
    str | None,
    typer.Option(
        help="Weights or modules that the model's files lack and that become random, comma-separated. [default: none]",
        rich_help_panel=_LORA,
    ),
]
UnusedWeights = Annotated[
    str | None,
    typer.Option(
        help="Weights or modules in the model's files that it has no place for, comma-separated. [default: none]",
        rich_help_panel=_LORA,
    ),
]
# Its choices are the compiler's, as those of the estimator.
TrainableOption = Annotated[
    str | None,
    typer.Option(
        help="What is trained: lora_B, lora_A+lora_B, requires_grad (what PEFT marks), or patterns of parameter names, "
        "separated by commas: '*.lora_B.*,*norm.weight'. By default lora_B; without LoRA, what PEFT marks.",
        show_default=False,
        rich_help_panel=_LORA,
    ),
]
Template = Annotated[
    str,
    typer.Option(
        help="The prompt; {NAME} is a column of the data. It ends where the label's word follows.",
        rich_help_panel=_TASK,
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        help="VALUE=WORD for each label; a word is one token, usually with a leading space.", rich_help_panel=_TASK
    ),
]
LabelColumn = Annotated[str, typer.Option(help="The data's column with the label.", rich_help_panel=_TASK)]
LossOption = Annotated[
    LossKind,
    typer.Option(help="Cross-entropy over the label words only, or over the vocabulary.", rich_help_panel=_TASK),
]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a prompt.", rich_help_panel=_TASK)]
BatchSize = Annotated[int, typer.Option(min=2, help="Examples in a batch.", rich_help_panel=_STEP)]
Queries = Annotated[int, typer.Option(min=1, help="Perturbations in a step.", rich_help_panel=_STEP)]
# Its choices are the estimators that are registered, which only the compiler knows; it takes seconds to import.
EstimatorOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How the gradient is estimated or computed; a name that is not registered lists those that are.",
        rich_help_panel=_STEP,
    ),
]
EstimatorOrAutoOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How the gradient is estimated, or exact; auto takes what learns most within --max-memory.",
        rich_help_panel=_STEP,
    ),
]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="UNIT",
        help="Of exact gradients: layer holds the layers' inputs alone, and computes each layer again. [default: none]",
        rich_help_panel=_STEP,
    ),
]
TargetName = Annotated[str, typer.Option(help="Where the program will run; see `mobizo targets`.")]
Precision = Annotated[
    str | None, typer.Option(help="What the program computes in. [default: the target's own]", show_default=False)
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="What a training step may need, such as 1.5GiB or 800MiB.", rich_help_panel=_STEP
    ),
]
NoiseOption = Annotated[
    Literal["gaussian", "rademacher"], typer.Option(help="Distribution of the perturbation.", rich_help_panel=_STEP)
]
NormalizeOption = Annotated[
    Literal["std"] | None,
    typer.Option(
        help="Divide the projected gradients by the standard deviation of the perturbed losses. [default: do not]",
        rich_help_panel=_STEP,
    ),
]
OptimizerOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="What makes a step of a gradient: sgd, momentum or adamw.", rich_help_panel=_STEP
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(min=0, help="Weight decay. [default: the optimizer's own]", show_default=False, rich_help_panel=_STEP),
]
ClipNorm = Annotated[
    float | None,
    typer.Option(help="Bound on the norm of the gradient. [default: none]", show_default=False, rich_help_panel=_STEP),
]
WeightsFile = Annotated[
    Path | None,
    typer.Option("--weights-file", help="The .ptd of a program with external weights. [default: beside the program]"),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Check the hashes of the program and its weights file first; reads them once, a gigabyte a second.",
    ),
]
BackendLibrary = Annotated[
    list[Path] | None,
    typer.Option(
        "--backend-library",
        help="A shared library with a backend for ExecuTorch's runtime, such as Vulkan's; may be given more than once.",
    ),
]
AdapterIn = Annotated[Path | None, typer.Option("--adapter", help="Start from this PEFT directory.")]


@dataclass(frozen=True)
class BuildOptions:
    """What decides the training step of a model: the options of `lower`, and of `inspect` on a model."""

    model: str
    template: str
    labels: str
    label_column: str
    loss: LossKind
    rank: int | None
    alpha: float | None
    target_modules: str | None
    layers: str | None
    init_seed: int
    trainable: str | None
    max_length: int
    batch: int
    queries: int
    estimator: str
    noise: Literal["gaussian", "rademacher"]
    normalize: Literal["std"] | None
    new_weights: str | None = None
    unused_weights: str | None = None
    optimizer: str = "sgd"
    weight_decay: float | None = None
    clip_norm: float | None = None
    checkpoint: str | None = None

    def check(self) -> None:
        """Find, before a model is loaded, values that no model can have.

        Raises:
            OptionError: names the option.
        """
        check_text("--label-column", self.label_column)
        if not self.label_column.strip():
            raise OptionError("--label-column is empty: give the name of a column of the data.")
        if self.layers is not None:
            parse_layers(self.layers)
        if self.target_modules is not None:
            check_text("--target-modules", self.target_modules)
            if not self.target_modules.replace(",", " ").strip():
                raise OptionError(f"--target-modules {self.target_modules!r} names no module.")
        if self.alpha is not None and not _SMALLEST <= self.alpha / (self.rank or 1) <= _LARGEST:
            raise OptionError(f"--alpha {self.alpha}: expected a finite number above 0.")
        tokens = self.batch * self.max_length * 2 * self.queries
        if tokens > _MOST_TOKENS:
            raise OptionError(
                f"--batch {self.batch} x --max-length {self.max_length} x 2 x --queries {self.queries}: a step of "
                f"{tokens:,} tokens; expected at most {_MOST_TOKENS:,}."
            )


#: Normal float32 numbers: alpha / rank is a factor in the graph.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38
#: More than any device has memory for; beyond it, making the example inputs alone would fill this machine's.
_MOST_TOKENS = 2**22
