"""The demo's program, SmolLM2-135M on XNNPACK: the same numbers as eager, and it survives being killed."""

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import runtime_driver
from examples.packaged import load_model, load_sentences
from tests.end_to_end.conftest import Demo

pytestmark = pytest.mark.real_model

STEPS = 12
ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import sys, torch, runtime_driver
program, batches, journal, adapter, steps = sys.argv[1:]
session = runtime_driver.Session(program)
session.fit(torch.load(batches), steps=int(steps), lr=2e-3, eps=1e-2, seed=7, journal=journal, progress=False)
session.save_adapter(adapter)
"""


@pytest.fixture(scope="module")
def batches(demo: Demo) -> list[dict[str, torch.Tensor]]:
    sentences = load_sentences(held_out=0).train[: STEPS * demo.module.BATCH]
    return demo.module.batches(sentences)


class Trained:
    """A finished run of `STEPS` steps: its directory, with `journal.jsonl` and `adapter/`, and its final adapter."""

    def __init__(self, demo: Demo, directory: Path, batches: list[dict[str, torch.Tensor]]) -> None:
        self.directory = directory
        torch.save(batches, directory / "batches.pt")
        self.session = runtime_driver.Session(demo.program)
        self.session.fit(
            batches,
            steps=STEPS,
            lr=2e-3,
            eps=1e-2,
            seed=7,
            journal=directory / "journal.jsonl",
            progress=False,
        )
        self.adapter = self.session.adapter
        self.session.save_adapter(directory / "adapter")


@pytest.fixture(scope="module")
def trained(demo: Demo, batches: list[dict[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(demo, tmp_path_factory.mktemp("trained"), batches)


def test_the_delegated_step_agrees_with_the_eager_step(demo: Demo, trained: Trained):
    program = demo.module.build_program(demo.module.FORWARD_ONLY, demo.upper_layers, estimator=demo.estimator)
    # Not the initial adapter: with B = 0 an error in how A enters would not show in the logits.
    adapter = trained.adapter
    trained.session.adapter = adapter
    batch, seed, lr, eps = demo.module.example_batch(), 123, 2e-3, 1e-2
    eager = program.step(adapter, batch, seed=seed, lr=lr, eps=eps)
    compiled = trained.session.step(batch, seed, lr, eps, update=False)
    trained.session.release()

    torch.testing.assert_close(torch.tensor(compiled.losses), eager.losses, rtol=1e-4, atol=0)
    # g = (L₊ − L₋) / 2ε, so an error δ in each of the two losses gives at most δ/ε in g. Thirty layers of fp32 sums in
    # another order leave about 1e-5 of the loss, one tenth of what is allowed to the losses themselves.
    tolerance = 1e-5 * float(eager.losses.abs().max()) / eps
    torch.testing.assert_close(
        torch.tensor(compiled.projected_gradients), eager.projected_gradients, rtol=0, atol=tolerance
    )
    # The update is η/q · Σ gᵢzᵢ, and the largest normal quantile that noise draws from is below 4.5.
    for fqn, expected in eager.adapter.items():
        torch.testing.assert_close(compiled.adapter[fqn], expected, rtol=0, atol=lr * tolerance * 4.5 + 1e-7)


def test_the_saved_adapter_is_a_peft_adapter_with_the_same_logits(demo: Demo, trained: Trained):
    from peft import PeftModel

    batch = demo.module.example_batch()
    expected = trained.session.predict(batch)
    trained.session.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns when it finds a key missing, and leaves lora_B zero
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(load_model(), str(trained.directory / "adapter")).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(**inputs, logits_to_keep=1).logits
        with model.disable_adapter():
            untrained = model(**inputs, logits_to_keep=1).logits
    assert (found - expected.reshape(found.shape)).abs().max() <= 1e-3
    # The training moved the logits by more than the tolerance, so an adapter that was not loaded could not pass.
    assert (found - untrained).abs().max() > 1e-2


def test_replaying_the_journal_gives_the_same_adapter_without_the_model(demo: Demo, trained: Trained):
    session = runtime_driver.Session(demo.program)
    assert session.replay(trained.directory / "journal.jsonl") == STEPS
    assert set(session.program.resident_methods()) <= {"apply"}
    assert any(tensor.abs().max() > 0 for tensor in session.adapter.values())
    for fqn, tensor in session.adapter.items():
        torch.testing.assert_close(tensor, trained.adapter[fqn], rtol=0, atol=1e-6)


def test_a_run_killed_at_five_moments_ends_in_the_same_adapter(demo: Demo, trained: Trained, tmp_path: Path):
    journal, adapter = tmp_path / "journal.jsonl", tmp_path / "adapter"
    command = [sys.executable, "-c", TRAIN, str(demo.program), str(trained.directory / "batches.pt"), str(journal)]
    command += [str(adapter), str(STEPS)]
    moments = random.Random(0)
    # Sorted: each start must get further than the death before it, or the moments would not be five.
    for steps_in_journal in sorted(moments.sample(range(STEPS - 1), 5)):
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            _wait_for_steps(journal, steps_in_journal, process)
            time.sleep(moments.uniform(0, 0.5))
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert not adapter.exists()
    subprocess.run(command, cwd=ROOT, check=True)

    resumed = runtime_driver.Session(demo.program)
    resumed.load_adapter(adapter)
    for fqn, tensor in resumed.adapter.items():
        torch.testing.assert_close(tensor, trained.adapter[fqn], rtol=0, atol=1e-6)
    assert len(_steps(journal)) == STEPS


def _steps(journal: Path) -> list[dict]:
    """The journal's step records; a last line without its end is what a kill leaves."""
    if not journal.exists():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, lines) if "projected_gradients" in record]


def _wait_for_steps(journal: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while len(_steps(journal)) < count:
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline, f"no {count} steps in the journal within 300 s"
        time.sleep(0.02)
