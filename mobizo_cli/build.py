"""From the options of `lower` to a training-step program."""

from __future__ import annotations

import fnmatch
import inspect
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mobizo_cli import model as models
from mobizo_cli import tokenizer_files
from mobizo_cli.data import ExampleBatches, remarks
from mobizo_cli.errors import ModelError, OptionError, note
from mobizo_cli.task import TextTask, parse_labels, template_columns
from mobizo_cli.text import PromptEncoder, label_ids

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

    import mobizo_passes as mz
    from mobizo_cli.data import Example
    from mobizo_cli.options import BuildOptions
    from mobizo_passes.sites.trainable import Trainable


@dataclass(frozen=True)
class Prepared:
    """A model with LoRA adapters and its task, before minutes of compiling; `encoder` makes batches for it."""

    options: BuildOptions
    loaded: models.Loaded
    task: TextTask
    encoder: PromptEncoder

    def transform(self) -> mz.TrainingProgram:
        """The training-step program.

        Raises:
            OptionError: this release does not have the estimator.
            ModelError, mobizo_passes.MobizoError: the model cannot be compiled.
        """
        import mobizo_passes as mz

        options, ids = self.options, self.task.label_ids
        inputs: dict[str, Any] = dict(self.example_batch())
        loss = None
        if options.loss == "label-words":
            loss = _label_word_loss(ids)
            if _takes_logits_to_keep(self.loaded.model):
                # The prompt ends at the last position: no other needs logits.
                inputs["logits_to_keep"] = 1
        try:
            return mz.transform(
                self.loaded.model,
                inputs,
                estimator=_estimator(options),
                optimizer=_optimizer(options),
                noise=options.noise,
                trainable=_trainable(options.trainable, self.loaded.model),
                loss=loss,
            )
        except mz.MobizoError as error:
            if self.loaded.kind == "LORA":
                raise
            raise ModelError(f"{options.model} is an adapter of the kind {self.loaded.kind}: {error}") from error

    def batches(self, path: Path, examples: Sequence[Example]) -> ExampleBatches:
        """Batches of a file's examples; says what a user should know of the file."""
        for remark in remarks(path, examples, self.task, self.encoder):
            note(remark)
        return ExampleBatches(examples, self.encoder, self.options.batch, seed=0)

    def example_batch(self) -> dict[str, Tensor]:
        """A batch of the program's shape: prompts of several lengths, so that its mask is as ragged as real data's."""
        options = self.options
        texts = [" ".join(["text"] * (1 + place % options.max_length)) for place in range(options.batch)]
        prompts = [self.task.prompt(dict.fromkeys(self.task.columns, text)) for text in texts]
        labels = [place % len(self.task.label_ids) for place in range(options.batch)]
        return self.encoder.batch(prompts, labels)


def draft(options: BuildOptions) -> TextTask:
    """The task before its tokenizer is known: enough to read a data file.

    Raises:
        OptionError: an option has a value that no model can have.
    """
    options.check()
    labels = parse_labels(options.labels)
    template_columns(options.template)
    return TextTask(
        template=options.template,
        label_column=options.label_column,
        label_values=tuple(labels),
        label_words=tuple(labels.values()),
        label_ids=(),
        loss=options.loss,
        max_length=options.max_length,
        tokenizer="",
    )


def prepare(options: BuildOptions, tokenizer_name: str, staged: Path | None = None) -> Prepared:
    """Load the model and its tokenizer.

    Args:
        tokenizer_name: the tokenizer's directory, beside the .pte.
        staged: where to write the tokenizer's files; None: nowhere.

    Raises:
        OptionError, ModelError, MissingPackageError: see `mobizo_cli.model` and `mobizo_cli.task`.
    """
    # Cheap checks first: loading and compiling take minutes.
    task = draft(options)
    _estimator(options)
    _optimizer(options)
    loaded = models.load(options)
    ids = label_ids(loaded.tokenizer.backend_tokenizer, list(task.label_words))
    if staged is not None:
        loaded.tokenizer.save_pretrained(staged)
    hashes = {} if staged is None else tokenizer_files.hashes(staged)
    task = replace(task, label_ids=ids, tokenizer=tokenizer_name, tokenizer_sha256=hashes)
    encoder = PromptEncoder(loaded.tokenizer.backend_tokenizer, ids, options.loss, options.max_length)
    _check_room(task, encoder)
    return Prepared(options, loaded, task, encoder)


def _estimator(options: BuildOptions) -> mz.Estimator:
    import mobizo_passes as mz
    from mobizo_passes.zo.estimators import estimator_kinds

    offered = {kind.replace("_", "-"): cls for kind, cls in estimator_kinds().items()}
    if options.estimator not in offered:
        raise OptionError(f"--estimator {options.estimator}: expected one of {', '.join(offered)}.")
    chosen = offered[options.estimator]
    if options.checkpoint is not None and not checkpoints(options.estimator):
        raise OptionError(f"--checkpoint {options.checkpoint}: {options.estimator} has no backward that needs them.")
    if options.normalize is not None and not chosen.uses_epsilon:
        raise OptionError(f"--normalize {options.normalize}: {options.estimator} has no losses to normalize by.")
    if options.checkpoint is not None:
        # The base class lacks this field.
        kind: Any = chosen
        try:
            return kind(checkpoint=options.checkpoint)
        except mz.InputError as error:
            raise OptionError(f"--checkpoint {options.checkpoint}: {error}.") from error
    return chosen(queries=options.queries, normalize=options.normalize) if chosen.projected else chosen()


def checkpoints(estimator: str) -> bool:
    """Whether the estimator of this name can compute activations again instead of holding them."""
    from mobizo_passes.zo.estimators import estimator_kinds

    return any(each.name == "checkpoint" for each in fields(estimator_kinds()[estimator.replace("-", "_")]))


def _optimizer(options: BuildOptions) -> mz.Optimizer:
    import mobizo_passes as mz
    from mobizo_passes.zo.optimizers import OPTIMIZERS

    if options.optimizer not in OPTIMIZERS:
        raise OptionError(f"--optimizer {options.optimizer}: expected one of {', '.join(OPTIMIZERS)}.")
    given = {"weight_decay": options.weight_decay, "clip_norm": options.clip_norm}
    try:
        return OPTIMIZERS[options.optimizer](**{name: value for name, value in given.items() if value is not None})
    except mz.InputError as error:
        raise OptionError(f"--optimizer {options.optimizer}: {error}") from error


def _trainable(text: str | None, model: nn.Module) -> Trainable:
    """What `transform` takes as `trainable`: one of its own words, or whether a name matches a pattern.

    Raises OptionError for a pattern that matches no parameter of the model.
    """
    from mobizo_passes.sites.trainable import MARKED, TRAINABLE

    if text is None or text in (*TRAINABLE, MARKED):
        return text
    names = [name for name, _ in model.named_parameters()]
    patterns = [pattern.strip() for pattern in text.split(",")]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise OptionError(
                f"--trainable {pattern}: expected one of {', '.join((*TRAINABLE, MARKED))}, or a pattern of the names "
                f"of the model's parameters, such as {', '.join(names[-2:])}."
            )
    return lambda name, _: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_room(task: TextTask, encoder: PromptEncoder) -> None:
    """Raise OptionError where the template leaves no token to a text."""
    alone = encoder.count(task.prompt(dict.fromkeys(task.columns, "")))
    if alone >= encoder.prompt_length:
        needed = task.max_length + alone + 1 - encoder.prompt_length
        raise OptionError(
            f"--max-length {task.max_length}: the template alone takes {alone} tokens, and a text at least one. "
            f"Give at least {needed}."
        )


def _label_word_loss(ids: tuple[int, ...]) -> Any:
    import torch.nn.functional as F

    words = list(ids)

    def loss(outputs: Any, label: Any) -> Any:
        return F.cross_entropy(outputs.logits[:, -1, words], label)

    return loss


def _takes_logits_to_keep(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
