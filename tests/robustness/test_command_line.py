"""The command line with options, models and adapters that are not right: one line, before work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobizo_cli import model as models
from mobizo_cli.errors import ModelError, OptionError, one_line
from mobizo_cli.task import TextTask, template_columns
from runtime_driver.adapter_config import check_config
from runtime_driver.errors import AdapterError
from runtime_driver.format import Manifest
from tests.driver.command import fails
from tests.driver.conftest import cli  # noqa: F401
from tests.robustness.options import LABELS, options

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"

# Options


@pytest.mark.parametrize(
    "template",
    [
        *(
            "{text!z}",
            "{text!r}",
            "{text!s}",
            "{text:d}",
            "{text:{text.__class__}}",
            "{text:99999999999}",
            "{text:{{}}}",
        ),
        *("{text.attr}", "{text[0]}", "{0}", "{}", "{ text }", "{a b}", "{\x00}", "{text", "text}", "", "It was"),
        "\udcff{text}",
    ],
)
def test_templates_hold_plain_names_only(template: str):
    with pytest.raises(OptionError, match="--template"):
        template_columns(template)


def test_braces_in_data_and_template_are_text():
    task = TextTask("{{x}} {a}{b}:", "y", ("0", "1"), ("a", "b"), (1, 2), "label-words", 8, "t")
    assert task.prompt({"a": "{b!z}", "b": "{"}) == "{x} {b!z}{:"


BAD_OPTIONS = [
    ({"alpha": 0.0}, "--alpha 0.0"),
    ({"alpha": -1.0}, "--alpha -1.0"),
    ({"alpha": float("nan")}, "--alpha nan"),
    ({"alpha": float("inf")}, "--alpha inf"),
    ({"alpha": 1e-60}, "--alpha 1e-60"),
    ({"layers": "²"}, "--layers"),
    ({"layers": "0-999999999"}, "--layers"),
    ({"layers": "9" * 5000}, "--layers"),
    ({"layers": "-1"}, "--layers"),
    ({"target_modules": " , "}, "--target-modules"),
    ({"target_modules": ""}, "--target-modules"),
    ({"label_column": " "}, "--label-column"),
    ({"label_column": "\udcff"}, "--label-column"),
    ({"labels": "0=\udcff,1=b"}, "--labels"),
    ({"batch": 10**9}, "--batch 1000000000"),
    ({"max_length": 10**9}, "--max-length 1000000000"),
    ({"queries": 10**9}, "--queries 1000000000"),
]


@pytest.mark.parametrize(("changed", "words"), BAD_OPTIONS, ids=[str(each)[:40] for each, _ in BAD_OPTIONS])
def test_options_are_refused_before_a_model_is_loaded(changed: dict[str, Any], words: str):
    from mobizo_cli.build import prepare

    with pytest.raises(OptionError) as caught:
        prepare(options("no-such-model", **changed), "t")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": "1,7-9"}, "layers 0 to 1; there can be no LoRA in `7`, `8`, `9`"),
        ({"target_modules": "q_proj,z_proj"}, "no LoRA on 'z_proj'"),
        ({"rank": 10**9}, "--rank 1000000000"),
        ({"new_weights": "lm_head"}, "--new-weights lm_head: no such weight"),
        ({"unused_weights": "score"}, "--unused-weights score: no such weight"),
    ],
)
def test_what_the_model_does_not_have(model: Path, changed: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        models.load(options(model, **changed))


def test_a_template_leaves_room_for_a_token(model: Path):
    from mobizo_cli.build import prepare

    for loss, length in (("label-words", 2), ("vocabulary", 3)):
        with pytest.raises(OptionError, match=f"--max-length {length}: .* 2 tokens.* at least {length + 1}"):
            prepare(options(model, loss=loss, max_length=length), "t")


LOWER = ["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"]
USED: list[tuple[list[str], list[str]]] = [
    (["lower", "no", "--template", "{text!r}", "--labels", LABELS, "-o", "m.pte"], ["--template"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "d.pte"], ["d.pte is a directory"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "n.pte"], ["n.json is not a manifest of ours"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "t.pte"], ["t.tokenizer/mine", "not a file of"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "f/m.pte"], ["f does not exist", "--output"]),
    (["lower", "", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["MODEL is empty"]),
    (["lower", "f", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["f is a file"]),
    ([*LOWER, "--precision", "x"], ["precision='x' is not possible", "expected one of fp32"]),
    ([*LOWER, "--option", "soc=SM8650"], ["'xnnpack' has no option 'soc'", "its options are precision, weights"]),
    ([*LOWER, "--option", "soc"], ["--option 'soc'", "expected KEY=VALUE"]),
    ([*LOWER, "--option", "=x"], ["--option '=x'", "expected KEY=VALUE"]),
    ([*LOWER, "--precision", "fp32", "--option", "precision=fp32"], ["'precision' is given already", "once"]),
    (["lower", "a\0b", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["zero byte"]),
    (["inspect", "no", "--graph", "f/g.svg"], ["--graph f/g.svg", "f does not exist"]),
    (["inspect", "no", "--graph", "g.html"], ["--graph g.html: is a directory"]),
    (["inspect", "d.pte"], ["d.pte"]),
    (["inspect", "no\n\x1b[31m.pte"], ["no \\x1b[31m.pte"]),
    (["inspect", "m" * 5000 + ".pte"], ["mmm"]),
    (["eval", "d.pte", "--data", "x.csv"], ["d.pte"]),
]


@pytest.mark.parametrize(("arguments", "words"), USED)
def test_one_line_and_nothing_changed(
    cli: Callable,  # noqa: F811
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
):
    (tmp_path / "d.pte").mkdir()
    (tmp_path / "d.pte" / "mine").write_text("mine")
    (tmp_path / "n.json").write_text("my notes")
    (tmp_path / "g.html").mkdir()
    (tmp_path / "t.tokenizer").mkdir()
    (tmp_path / "t.tokenizer" / "mine").write_text("mine")
    (tmp_path / "f").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    fails(cli(*arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "n.json").read_text() == "my notes"


def test_messages_are_one_line_without_control_characters():
    assert one_line(OSError(2, "No such file", "a\nb\x1b[0m")) == "a b\\x1b[0m: No such file"
    assert len(one_line(OSError(36, "File name too long", "x" * 5000))) < 900
    assert "not enough memory" in one_line(MemoryError())


# What a program's manifest says of its task


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", "../portable.tokenizer"),
        ("tokenizer", "/etc"),
        ("tokenizer", ".."),
        ("tokenizer", ""),
        ("tokenizer", 1),
        ("template", "{text!r}"),
        ("template", "{text.__class__}"),
        ("template", None),
        ("label_ids", [4, True]),
        ("label_ids", [4]),
        ("label_words", "ab"),
        ("max_length", 10**12),
        ("loss", "other"),
        ("tokenizer_sha256", {"tokenizer.json": 1}),
    ],
)
def test_a_task_that_was_tampered_with(field: str, value: object):
    data = json.loads((FIXTURES / "portable.json").read_text())
    TextTask.of(Manifest.from_dict(data), Path("m.pte"))
    data["application"][field] = value
    with pytest.raises(ModelError, match=r"^m\.pte: "):
        TextTask.of(Manifest.from_dict(data), Path("m.pte"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 4}, "`r` is 4, but 3 in the program"),
        ({"lora_alpha": 1}, "`lora_alpha` is 1"),
        ({"use_rslora": True}, "`use_rslora` is True"),
        ({"alpha_pattern": {"q_proj": 1}}, "`alpha_pattern`"),
        ({"peft_type": "ADALORA"}, "`peft_type` is 'ADALORA'"),
        ("[" * 100_000, "not JSON"),
        (None, "cannot be read"),
    ],
)
def test_an_adapter_of_another_configuration_is_not_the_programs(tmp_path: Path, config: Any, words: str):
    manifest = Manifest.load(FIXTURES / "portable.json")
    directory = Path(shutil.copytree(FIXTURES / "portable.adapter", tmp_path / "a"))
    path = directory / "adapter_config.json"
    check_config(directory, manifest.peft)
    if isinstance(config, dict):
        config = json.dumps({**json.loads(path.read_text()), **config})
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(AdapterError, match=words):
        check_config(directory, manifest.peft)
