"""`mobizo lower`: what the options of targets become, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowering
from lowering.targets import TARGETS, get_target
from tests.driver import text_model
from tests.driver.command import Cli, fails

TASK = ("--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12")
INTEGERS = ("--target", "qnn", "--precision", "16a8w")


class Stopped(lowering.LoweringError):
    """Raised in the place of lowering."""


def test_options_of_other_targets_are_refused_before_anything_is_loaded(cli: Cli):
    task = ("--template", "{text} It was", "--labels", "0= bad,1= good", "-o", "x.pte")
    fails(
        cli("lower", "nothing", *task, "--precision", "8a8w"),
        "precision='8a8w' is not possible for target 'xnnpack': expected one of fp32",
    )
    fails(cli("lower", "nothing", *task, "--target", "vulkan", "--precision", "int8"), "expected one of fp32, fp16")


def test_ranges_are_asked_for_before_anything_is_loaded(cli: Cli, tmp_path: Path):
    data = text_model.save_rows(tmp_path / "rows.jsonl", 2, 2)
    fails(cli("lower", "nothing", *TASK, "-o", "x.pte", *INTEGERS), "--precision 16a8w needs --calibrate FILE")
    fails(cli("lower", "nothing", *TASK, "-o", "x.pte", "--calibrate", data), "not quantized; leave it out")
    done = cli("lower", "nothing", *TASK, "-o", "x.pte", *INTEGERS, "--calibrate", "missing.csv")
    assert done.code != 0
    assert "missing.csv" in done.err


@pytest.fixture
def qnn_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_target("qnn")), "require", lambda self: None)


@pytest.mark.usefixtures("qnn_is_ready")
def test_a_file_that_ranges_cannot_come_from_is_refused_before_anything_is_loaded(cli: Cli, tmp_path: Path):
    (tmp_path / "rows.csv").write_text("text,other\na film,1\n")
    command = ("lower", "nothing", *TASK, "-o", "x.pte", *INTEGERS, "--calibrate", "rows.csv")
    fails(cli(*command), "rows.csv, line 2: no column 'label'")
    (tmp_path / "rows.csv").write_text("text,label\na film,7\n")
    fails(cli(*command), "rows.csv, line 2: the label '7' has no word")


@pytest.mark.usefixtures("qnn_is_ready")
def test_what_is_cut_of_the_examples_is_said_before_the_model_is_compiled(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(prepared: Any) -> None:
        raise Stopped("compiling")

    monkeypatch.setattr("mobizo_cli.build.Prepared.transform", stop)
    model = text_model.save_model(tmp_path / "model")
    (tmp_path / "rows.csv").write_text(f"text,label\n{'film ' * 40},1\n")
    done = cli("lower", model, *TASK, "--rank", 4, "-o", "x.pte", *INTEGERS, "--calibrate", "rows.csv")
    assert "rows.csv: 1 of 1 texts were cut" in done.err
    assert "error: compiling" in done.err


@pytest.mark.usefixtures("qnn_is_ready")
def test_examples_become_the_batches_that_ranges_are_measured_on(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = text_model.save_model(tmp_path / "model")
    data = text_model.save_rows(tmp_path / "rows.jsonl", 6, 6)
    seen: dict[str, Any] = {}

    def lower(program: Any, **arguments: Any) -> None:
        seen.update(arguments, inputs=program.manifest()["batch"]["inputs"])
        raise Stopped("seen")

    monkeypatch.setattr(lowering, "lower", lower)
    ranges = ("--calibrate", data, "--calibration-batches", 3, "--measure", data, "--measure-batches", 2)
    fails(cli("lower", model, *TASK, "--rank", 4, "--batch", 2, "-o", "x.pte", *INTEGERS, *ranges), "seen")
    assert seen["precision"] == "16a8w"
    assert (len(seen["calibration"]), len(seen["measure"])) == (3, 2)
    for batch in (*seen["calibration"], *seen["measure"]):
        assert sorted(batch) == sorted(seen["inputs"])
        assert all(len(value) == 2 for value in batch.values())
    assert list(tmp_path.glob("x*")) == []


def test_options_reach_the_lowering(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = text_model.save_model(tmp_path / "model")
    seen: dict[str, Any] = {}

    def lower(program: Any, **arguments: Any) -> None:
        seen.update(arguments)
        raise Stopped("seen")

    monkeypatch.setattr(lowering, "lower", lower)
    monkeypatch.setattr(type(get_target("qnn")), "require", lambda self: None)
    options = ("--target", "qnn", "--precision", "fp16", "--option", "soc=SM8750", "--option", "weights=shared")
    fails(
        cli("lower", model, *TASK, "-o", "x.pte", "--etrecord", "no/where"), "--etrecord no/where: expected a file in"
    )
    options = (*options, "--etrecord", "x.etrecord")
    fails(cli("lower", model, *TASK, "--rank", 4, "-o", "x.pte", *options), "seen")
    assert {name: seen[name] for name in ("target", "precision", "soc", "weights", "etrecord")} == {
        "etrecord": True,
        "target": "qnn",
        "precision": "fp16",
        "soc": "SM8750",
        "weights": "shared",
    }


def test_targets_lists_every_option_with_its_help(cli: Cli):
    shown = cli("targets").out
    for target in TARGETS.values():
        for option in target.all_options:
            assert option.name in shown
            assert option.help.split()[0] in shown
    assert "--option soc=" in shown
    assert "8a8w" in shown


PROMPT = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("kind", "config", "given", "trainable", "trained"),
    [
        ("Lora", {"r": 3}, (), "lora_B", {"lora_B": 4}),
        ("Lora", {"r": 3}, ("--trainable", "requires_grad"), "requires_grad", {"lora_A": 4, "lora_B": 4}),
        ("Lora", {"r": 3}, ("--trainable", "*.0.*.lora_B.*, *.norm.weight"), "parameters", {"lora_B": 2, "norm": 1}),
        ("IA3", {"target_modules": ["v_proj"], "feedforward_modules": []}, (), "requires_grad", {"ia3_l": 2}),
        ("PromptTuning", PROMPT, (), "requires_grad", {"prompt_encoder": 1}),
    ],
    ids=["default", "marked", "patterns", "IA3", "prompt tuning"],
)
def test_trainable_names_what_is_trained(
    kind: str, config: dict[str, Any], given: tuple[str, ...], trainable: str, trained: dict[str, int],
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    import peft
    import transformers

    seen: dict[str, Any] = {}

    def lower(program: Any, **arguments: Any) -> None:
        seen.update(program.manifest())
        raise Stopped("seen")

    base = transformers.AutoModelForCausalLM.from_pretrained(text_model.save_model(tmp_path / "model"))
    adapted = peft.get_peft_model(base, getattr(peft, f"{kind}Config")(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.fill_(0.25)
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(lowering, "lower", lower)
    done = cli("lower", tmp_path / "adapter", *TASK, "-o", "x.pte", *given)
    assert "error: seen" in done.err, done.err
    assert seen["trainable"] == trainable
    names = [tensor["fqn"] for tensor in seen["adapter"] if tensor["trainable"]]
    assert len(names) == sum(trained.values()), names
    for part, count in trained.items():
        assert sum(part in name for name in names) == count, names


def test_a_pattern_that_matches_nothing_is_refused(cli: Cli, tmp_path: Path):
    model = text_model.save_model(tmp_path / "model")
    done = cli("lower", model, *TASK, "--rank", 4, "-o", "x.pte", "--trainable", "lora_C")
    fails(done, "--trainable lora_C: expected one of lora_B, lora_A+lora_B, requires_grad, or a pattern")
