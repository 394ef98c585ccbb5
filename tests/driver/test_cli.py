"""The `mobizo` command: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from mobizo_cli.main import run
from mobizo_passes import parse
from tests.driver import text_model, tiny
from tests.driver.command import Cli, fails

ROOT = Path(__file__).parents[2]
TASK = ["--template", "{text} It was", "--labels", "0=terrible,1=great", "--max-length", "12"]
STEP = ["--rank", "4", "--queries", "2", "--target", "portable"]


@dataclass(frozen=True)
class World:
    """A model, data, and a program lowered by the command; tests must not write here."""

    model: Path
    train: Path
    test: Path
    pte: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = text_model.save_model(root / "model")
    train, test = (text_model.save_rows(root / f"{n}.jsonl", c, c) for n, c in (("train", 40), ("test", 10)))
    command = ["lower", str(model), "-o", str(root / "sentiment.pte"), *TASK, *STEP]
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        run(command)
    logging.disable(logging.NOTSET)
    assert not caught.value.code
    return World(model, train, test, root / "sentiment.pte")


def train_command(world: World, steps: int, out: str, *more: object) -> list[object]:
    return ["train", world.pte, "--data", world.train, "--steps", steps, "--lr", 0.05, "--adapter-out", out, *more]


# What the commands do


def test_lower_writes_the_program_its_manifest_and_its_tokenizer(world: World):
    written = {path.name for path in world.pte.parent.iterdir()} - {"model", "train.jsonl", "test.jsonl"}
    assert written == {"sentiment.pte", "sentiment.json", "sentiment.tokenizer"}
    manifest = json.loads(world.pte.with_suffix(".json").read_text())
    assert manifest["application"] == {
        "task": "text-classification",
        "template": "{text} It was",
        "label_column": "label",
        "label_values": ["0", "1"],
        "label_words": ["terrible", "great"],
        "label_ids": [4, 5],
        "loss": "label-words",
        "max_length": 12,
        "tokenizer": "sentiment.tokenizer",
        "tokenizer_sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in world.pte.with_suffix(".tokenizer").iterdir()
        },
    }


def test_train_in_two_parts_replay_and_export_give_the_same_bits(world: World, cli: Cli, tmp_path: Path):
    assert cli(*train_command(world, 12, "whole")).code == 0
    assert cli(*train_command(world, 5, "part", "--journal", "run.jsonl")).code == 0
    second = cli(*train_command(world, 12, "part", "--journal", "run.jsonl", "--eval-data", world.test))
    assert second.code == 0
    assert "12 (5 from the journal)" in second.out
    assert "evaluation at 12" in second.out
    assert cli("replay", world.pte, "--journal", "run.jsonl", "--adapter-out", "replayed").code == 0
    assert cli("export-adapter", world.pte, "--journal", "run.jsonl", "-o", "exported").code == 0
    names = ("whole", "part", "replayed", "exported")
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1
    assert cli("export-adapter", world.pte, "-o", "initial").code == 0
    initial = (tmp_path / "initial" / "adapter_model.safetensors").read_bytes()
    assert initial != (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()


def test_a_worker_under_torchrun_reads_its_own_data(world: World, cli: Cli, tmp_path: Path, monkeypatch):
    """One worker of one: the environment is torchrun's, and gloo is real."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fails(cli(*train_command(world, 2, "none", "--parallel", "data")), "torchrun")
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    shutil.copy(world.train, tmp_path / "shard-0.jsonl")
    command = train_command(world, 2, "shared", "--parallel", "data", "--journal", "run.jsonl")
    done = cli(*[tmp_path / "shard-{rank}.jsonl" if each == world.train else each for each in command])
    assert done.code == 0, done.err
    assert "0 bytes by each of 1 workers" in done.out
    assert cli(*train_command(world, 2, "alone")).code == 0
    assert cli("replay", world.pte, "--journal", "run.jsonl", "--adapter-out", "replayed").code == 0
    names = ("shared", "alone", "replayed")
    assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1


def test_training_improves_what_eval_reports(world: World, cli: Cli):
    before = cli("eval", world.pte, "--data", world.train)
    assert cli(*train_command(world, 150, "adapter", "--schedule", "linear", "--eps", 0.02)).code == 0
    after = cli("eval", world.pte, "--data", world.train, "--adapter", "adapter")
    losses = [float(done.out.split("loss")[1].split()[0]) for done in (before, after)]
    assert losses[1] < 0.95 * losses[0]
    assert "(" in after.out
    assert "of 40)" in after.out


def test_training_goes_on_from_an_adapter(world: World, cli: Cli, tmp_path: Path):
    assert cli(*train_command(world, 3, "first")).code == 0
    assert cli(*train_command(world, 2, "second", "--adapter", "first", "--journal", "run.jsonl")).code == 0
    assert cli("replay", world.pte, "--journal", "run.jsonl", "--adapter-out", "replayed").code == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("second", "replayed")]
    assert weights[0] == weights[1]


def test_vocabulary_loss(world: World, cli: Cli):
    assert cli("lower", world.model, "-o", "v.pte", *TASK, *STEP, "--loss", "vocabulary").code == 0
    done = cli("train", "v.pte", "--data", world.train, "--steps", 3, "--adapter-out", "a", "--eval-data", world.test)
    assert done.code == 0, done.err
    assert "accuracy" in cli("eval", "v.pte", "--data", world.test, "--adapter", "a").out


def test_a_trained_adapter_is_a_model_for_lower(world: World, cli: Cli, tmp_path: Path):
    assert cli(*train_command(world, 3, "adapter")).code == 0
    options = ("--queries", 2, "--target", "portable", "--adapter", "internal")
    again = cli("lower", "adapter", "-o", "again.pte", *TASK, *options)
    assert again.code == 0, again.err
    assert "internal" in cli("inspect", "again.pte").out
    assert cli("export-adapter", "again.pte", "-o", "exported").code == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "exported")]
    assert weights[0] == weights[1]
    fails(cli("lower", "adapter", "-o", "other.pte", *TASK, "--rank", 4), "--rank", "PEFT adapter")


def test_inspect_a_program(world: World, cli: Cli):
    done = cli("inspect", world.pte)
    assert done.code == 0
    assert done.err == ""
    for word in (
        "LlamaForCausalLM",
        "two_sided, 2 queries",
        "normalized by",
        "int64[4, 12]",
        "adapter: 4 tensors",
        "{text} It was",
    ):
        assert word in done.out


def test_inspect_a_model(world: World, cli: Cli):
    done = cli("inspect", world.model, *TASK, "--layers", "1", "--rank", 4, "--normalize", "std")
    assert done.code == 0, done.err
    assert "TwoSided(queries=4, normalize='std')" in done.out
    assert "layers.1.self_attn.q_proj" in done.out
    assert "layers.0.self_attn.q_proj" not in done.out
    assert "expand-perturbations" in done.out
    assert "computed once" in done.out


def test_inspect_prints_json_for_scripts(world: World, cli: Cli):
    done = cli("inspect", world.model, *TASK, "--layers", "1", "--rank", 4, "--json")
    shown = json.loads(done.out)
    assert [site["name"].rpartition(".")[2] for site in shown["sites"]] == ["q_proj", "v_proj"]
    assert {each["name"] for each in shown["passes"]} >= {"insert-mp-lora", "expand-perturbations"}
    assert 0 < shown["flops"]["share_computed_once"] < 1
    nodes = {node["name"]: node for node in shown["nodes"]}
    product = next(node for node in shown["nodes"] if node["op"] == "mobizo.mp_lora")
    assert all(name in nodes for name in product["inputs"])
    assert product["source"].startswith("peft/tuners/lora/layer.py:")
    assert json.loads(cli("inspect", world.pte, "--json").out)["model"]["name"] == "LlamaForCausalLM"


def test_inspect_prints_the_program_with_the_lines_of_the_model(world: World, cli: Cli):
    text = cli("inspect", world.model, *TASK, "--layers", "1", "--rank", 4, "--text").out
    assert "\n# transformers/models/llama/modeling_llama.py:" in text
    assert parse(text).output_node("loss").target is torch.ops.aten.mean.default


def test_inspect_draws_the_graph_and_shows_what_a_pass_changed(world: World, cli: Cli, tmp_path: Path):
    command = ("inspect", world.model, *TASK, "--layers", "1", "--rank", 4, "--diff", "expand-perturbations")
    done = cli(*command, "--graph", "step.html")
    assert done.code == 0, done.err
    assert done.out.startswith("--- before expand-perturbations\n+++ after expand-perturbations\n@@ line ")
    assert "mobizo.expand" in done.out
    assert "\x1b" not in done.out
    assert "mobizo.expand" in (tmp_path / "step.html").read_text(encoding="utf-8")


def test_what_inspect_cannot_show_is_said_before_the_model_is_loaded(
    world: World, cli: Cli, monkeypatch: pytest.MonkeyPatch
):
    fails(cli("inspect", "nothing", "--graph", "step.pdf"), "drawn as .svg, .html or .json", "'step.pdf'")
    fails(cli("inspect", "nothing", "--everything"), "--diff PASS")
    fails(cli("inspect", "nothing", "--json", "--diff", "lift-adapter"), "take one of them")
    fails(cli("inspect", world.pte, "--text"), "need a model", "lowered")
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    fails(cli("inspect", "nothing", "--explore"), "`ai-edge-model-explorer`", "pip install 'mobizo[explore]'")


def test_inspect_opens_model_explorer(world: World, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    class Stub(ModuleType):
        """What is called of the package."""

        paths: ClassVar[list[Path]] = []

        def config(self) -> Stub:
            return self

        def add_model_from_path(self, path: str) -> Stub:
            self.paths.append(Path(path))
            return self

        add_node_data_from_path = add_model_from_path

        def visualize_from_config(self, config: Stub) -> None:
            assert all(json.loads(path.read_text()) for path in config.paths)

    stub = Stub("model_explorer")
    stub.__spec__ = ModuleSpec("model_explorer", None)
    monkeypatch.setitem(sys.modules, "model_explorer", stub)
    assert cli("inspect", world.model, *TASK, "--layers", "1", "--rank", 4, "--explore").code == 0
    assert [path.name for path in stub.paths[:2]] == ["step.json", "step.bytes-of-values.json"]
    assert not stub.paths[0].exists()
    fails(cli("inspect", world.pte, "--graph", "step.svg"), "need a model", "lowered")


def test_targets(cli: Cli):
    done = cli("targets")
    assert done.code == 0
    for name in ("portable", "xnnpack", "vulkan", "qnn"):
        assert name in done.out
    assert "lowers here" in done.out
    assert "runs here" in done.out


def test_ctrl_c_says_how_to_go_on(world: World, tmp_path: Path):
    arguments = [str(a) for a in train_command(world, 200_000, "adapter", "--journal", "run.jsonl")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mobizo_cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "run.jsonl").exists() or (tmp_path / "run.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert err == ""
    assert "interrupted after step" in out
    assert "run the same command again" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


# How they fail


def test_help_imports_nothing_heavy():
    code = (
        "import sys, mobizo_cli.main as m\n"
        "try:\n    m.run(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'executorch', 'transformers', 'peft', 'mobizo_passes', 'lowering', 'runtime_driver'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("inspect", "lower", "train", "eval", "replay", "export-adapter", "targets"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["inspect", "lower", "train", "eval", "replay", "export-adapter", "targets"])
def test_every_command_has_help(cli: Cli, command: str):
    done = cli(command, "--help")
    assert done.code == 0
    assert "Usage" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lower", "model", "-o", "x.bin", *TASK], ["--output x.bin", ".pte"]),
        (["lower", "model", "-o", "missing/x.pte", *TASK], ["missing", "does not exist"]),
        (["lower", "model", "-o", "x.pte", *TASK, "--target", "tpu"], ["unknown target 'tpu'", "xnnpack"]),
        (["lower", "model", "-o", "x.pte", *TASK, "--labels", "0"], ["--labels", "VALUE=WORD"]),
        (["lower", "model", "-o", "x.pte", *TASK, "--template", "It was"], ["--template", "names no column"]),
        (["lower", "model", "-o", "x.pte", *TASK, "--layers", "a-b"], ["--layers"]),
        (
            ["lower", "model", "-o", "x.pte", *TASK, "--normalize=std", "--estimator=one-sided", "--queries=1"],
            ["at least 2 perturbed losses", "take more queries"],
        ),
        (["lower", "no/such/model", "-o", "x.pte", *TASK], ["cannot load the model no/such/model"]),
        (["inspect", "no.pte"], ["no.pte: no such file"]),
        (["eval", "no.pte", "--data", "x.csv"], ["no.pte: no such file"]),
        (["replay", "no.pte", "--journal", "x", "--adapter-out", "a"], ["no.pte: no such file"]),
        (["export-adapter", "no.pte", "-o", "a"], ["no.pte: no such file"]),
    ],
)
def test_bad_arguments(cli: Cli, tmp_path: Path, arguments: list[str], words: list[str]):
    fails(cli(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--labels", "0=terrible film,1=great"], ["'terrible film' is 2 tokens", "expected one"]),
        (["--labels", "0=great,1=great"], ["are the same token"]),
        (["--labels", "0=great,1=lovely"], ["'lovely' is not in the tokenizer's vocabulary"]),
        (["--target-modules", "c_attn"], ["cannot load a LoRA on c_attn"]),
        (["--layers", "7"], ["LoRA"]),
    ],
)
def test_a_model_that_does_not_fit_leaves_nothing(
    world: World, cli: Cli, tmp_path: Path, more: list[str], words: list[str]
):
    fails(cli("lower", world.model, "-o", "x.pte", *TASK, *STEP, *more), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, ["none.csv: no such file"]),
        ("a.txt", "x", ["a.txt", ".jsonl or .csv"]),
        ("a.csv", "sentence,label\nx,0\n", ["line 2: no column 'text'", "['label', 'sentence']"]),
        ("a.jsonl", '{"text": "x", "label": 5}', ["line 1: the label '5' has no word"]),
        ("a.jsonl", "{", ["line 1: not JSON"]),
        ("a.jsonl", "", ["holds no rows"]),
    ],
)
def test_bad_data_leaves_nothing(world: World, cli: Cli, tmp_path: Path, name: str, content: str | None, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    command = ["train", world.pte, "--steps", 2, "--adapter-out", "adapter", "--journal", "run.jsonl"]
    fails(cli(*command, "--data", name), *words)
    fails(cli(*command, "--data", world.train, "--eval-data", name), *words)
    fails(cli("eval", world.pte, "--data", name), *words)
    assert sorted(tmp_path.iterdir()) == before


def test_other_failures_of_train(world: World, cli: Cli, tmp_path: Path):
    fails(cli(*train_command(world, 2, "a", "--eval-every", 1)), "--eval-every needs --eval-data")
    fails(cli(*train_command(world, 2, "a", "--eps", 0)), "`eps` must be")
    fails(cli(*train_command(world, 2, "a", "--adapter", "missing")), "missing: no such directory")
    (tmp_path / "file").write_text("mine")
    fails(cli(*train_command(world, 2, "file")), "file: is a file")
    fails(cli(*train_command(world, 2, "a", "--journal", "file")), "file, line 1", "mobizo-journal")
    assert (tmp_path / "file").read_text() == "mine"
    assert cli(*train_command(world, 2, "a", "--journal", "run.jsonl")).code == 0
    fails(cli(*train_command(world, 4, "b", "--journal", "run.jsonl", "--seed", 1)), "`seed` is 0 in the journal")
    fails(cli(*train_command(world, 1, "b", "--journal", "run.jsonl")), "`steps` is 2 in the journal")
    fails(
        cli(
            "train",
            world.pte,
            "--data",
            world.test,
            "--steps",
            4,
            "--lr",
            0.05,
            "--adapter-out",
            "b",
            "--journal",
            "run.jsonl",
        ),
        "`data` is",
    )
    assert not (tmp_path / "b").exists()


def test_a_program_without_its_tokenizer_or_task(world: World, cli: Cli, built_pte: Path, tmp_path: Path):
    shutil.copy(world.pte, tmp_path / "alone.pte")
    fails(cli("eval", "alone.pte", "--data", world.test), "sentiment.tokenizer", "no such file")
    shutil.copytree(world.pte.with_suffix(".tokenizer"), tmp_path / "sentiment.tokenizer")
    path = tmp_path / "sentiment.tokenizer" / "tokenizer.json"
    own = path.read_text()
    path.write_text(own.replace('"great": 5', '"great": 6').replace('"a": 6', '"a": 5'))
    fails(cli("eval", "alone.pte", "--data", world.test), "not the tokenizer that the program was lowered with")
    path.write_text(own.replace('"a": 6', '"a": 7').replace('"film": 7', '"film": 6'))
    fails(cli("eval", "alone.pte", "--data", world.test), "not the tokenizer", "tokenizer.json is another one")
    path.write_text("{}")
    fails(cli("eval", "alone.pte", "--data", world.test), "not a tokenizer")
    fails(cli("eval", built_pte, "--data", world.test), "carries no text task")


def test_damaged_programs(world: World, cli: Cli, tmp_path: Path):
    (tmp_path / "cut.pte").write_bytes(world.pte.read_bytes()[:-1000])
    fails(cli("inspect", "cut.pte"), "truncated")
    (tmp_path / "text.pte").write_text("hello")
    fails(cli("inspect", "text.pte"), "not a .pte file")
    tiny.build(tmp_path / "later.pte", manifest=json.dumps(tiny.manifest_dict(format_version=9)), methods=["step"])
    fails(cli("inspect", "later.pte"), "format_version", "expected 1 or 2, found 9")
