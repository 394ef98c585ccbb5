"""From the options of `lower` to a training-step program."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mobizo_cli import model as models
from mobizo_cli.errors import OptionError
from mobizo_cli.task import TextTask, parse_labels, parse_layers, template_columns
from mobizo_cli.text import PromptEncoder, label_ids

if TYPE_CHECKING:
    import mobizo_passes as mz
    from mobizo_cli.options import BuildOptions

_ESTIMATORS = {"two-sided": "TwoSided", "one-sided": "OneSided", "forward-gradient": "ForwardGradient"}


@dataclass(frozen=True)
class Built:
    """A program, its task, the tokenizer to store beside it, and what makes batches with it."""

    program: mz.TrainingProgram
    task: TextTask
    tokenizer: Any
    encoder: PromptEncoder


def build(options: BuildOptions, tokenizer_name: str) -> Built:
    """Load the model, make example inputs, transform.

    Args:
        tokenizer_name: the tokenizer's directory, relative to the .pte.

    Raises:
        OptionError, ModelError, MissingPackageError: see `mobizo_cli.model` and `mobizo_cli.task`.
        mobizo_passes.MobizoError: the model cannot be compiled.
    """
    # Cheap checks first: loading and compiling take minutes.
    labels = parse_labels(options.labels)
    columns = template_columns(options.template)
    if options.layers is not None:
        parse_layers(options.layers)

    import mobizo_passes as mz

    kind = getattr(mz, _ESTIMATORS[options.estimator], None)
    if kind is None:
        raise OptionError(f"--estimator {options.estimator}: this release does not have it yet.")
    estimator = kind(queries=options.queries, normalize=options.normalize)
    loaded = models.load(options)
    ids = label_ids(loaded.tokenizer.backend_tokenizer, list(labels.values()))
    task = TextTask(
        template=options.template,
        label_column=options.label_column,
        label_values=tuple(labels),
        label_words=tuple(labels.values()),
        label_ids=ids,
        loss=options.loss,
        max_length=options.max_length,
        tokenizer=tokenizer_name,
    )
    encoder = PromptEncoder(loaded.tokenizer.backend_tokenizer, ids, options.loss, options.max_length)
    # Prompts of several lengths, so that the example's mask is as ragged as real data's.
    texts = [" ".join(["text"] * (1 + place)) for place in range(options.batch)]
    prompts = [options.template.format(**dict.fromkeys(columns, text)) for text in texts]
    inputs: dict[str, Any] = dict(encoder.batch(prompts, [place % len(ids) for place in range(options.batch)]))
    loss = None
    if options.loss == "label-words":
        loss = _label_word_loss(ids)
        if _takes_logits_to_keep(loaded.model):
            # The prompt ends at the last position: no other needs logits.
            inputs["logits_to_keep"] = 1
    program = mz.transform(
        loaded.model,
        inputs,
        estimator=estimator,
        noise=options.noise,
        trainable=options.trainable,
        loss=loss,
    )
    return Built(program, task, loaded.tokenizer, encoder)


def _label_word_loss(ids: tuple[int, ...]) -> Any:
    import torch.nn.functional as F

    words = list(ids)

    def loss(outputs: Any, label: Any) -> Any:
        return F.cross_entropy(outputs.logits[:, -1, words], label)

    return loss


def _takes_logits_to_keep(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
