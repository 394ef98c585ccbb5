"""A directory with one file of every kind that the commands read, and what is done with it after each mutation.

Nothing is compiled: the program is the one of version 0.1 in `tests/fixtures`, brought to format 2 (the version and the
tokenizer's hashes in its manifest, and the footer). To have more files damaged, add a `Kind`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobizo_cli.tokenizer_files import hashes
from runtime_driver.format.footer import with_footer
from tests.robustness.mutations import Damage, mutate, mutate_text

FILES = Path(__file__).parents[1] / "fixtures" / "v0_1"
OUT = "out"
STEPS = 12


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: what is damaged, relative to the world.
        command: of `mobizo`, in the world's directory; writes an adapter to `OUT`.
        damage: how.
    """

    name: str
    file: str
    command: tuple[str, ...]
    damage: Callable[..., Damage] = mutate


_REPLAY = ("replay", "model.pte", "--journal", "run.jsonl", "--adapter-out", OUT)
_TRAIN = ("train", "model.pte", "--data", "train.jsonl", "--lr", "0.05", "--adapter-out", OUT)
_RESUME = (*_TRAIN, "--steps", str(STEPS), "--journal", "part.jsonl")
_FROM_ADAPTER = (*_TRAIN, "--steps", "1", "--adapter", "adapter")
_OLD = ("replay", "old.pte", "--journal", "old.jsonl", "--adapter-out", OUT)

KINDS = (
    Kind("program, replayed", "model.pte", _REPLAY),
    Kind("program, trained", "model.pte", (*_TRAIN, "--steps", "1")),
    Kind("manifest beside the program", "model.json", _REPLAY, mutate_text),
    Kind("snapshot", "run.jsonl.snapshot.safetensors", _REPLAY),
    Kind("journal, replayed", "run.jsonl", _REPLAY, mutate_text),
    Kind("journal, resumed", "part.jsonl", _RESUME, mutate_text),
    Kind(
        "initial adapter",
        "more.jsonl.initial.safetensors",
        ("replay", "model.pte", "--journal", "more.jsonl", "--adapter-out", OUT),
    ),
    Kind("adapter", "adapter/adapter_model.safetensors", _FROM_ADAPTER),
    Kind("tokenizer", "portable.tokenizer/tokenizer.json", (*_TRAIN, "--steps", "1"), mutate_text),
    Kind(
        "tokenizer's configuration", "portable.tokenizer/tokenizer_config.json", (*_TRAIN, "--steps", "1"), mutate_text
    ),
    Kind("journal of format 1", "old.jsonl", _OLD, mutate_text),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended. `fault`: what must never happen, None if it did not."""

    code: int
    said: str
    adapter: bytes | None
    fault: str | None = None


def build(root: Path) -> Path:
    """Make the world in an empty directory."""
    for name in ("train.jsonl", "portable.tokenizer"):
        copy = shutil.copytree if (FILES / name).is_dir() else shutil.copy
        copy(FILES / name, root / name)
    program = (FILES / "portable.pte").read_bytes()
    (root / "old.pte").write_bytes(program)
    shutil.copy(FILES / "portable.jsonl", root / "old.jsonl")
    inside, manifest = _in_format_2(program)
    (root / "model.pte").write_bytes(with_footer(inside))
    (root / "model.json").write_text(json.dumps(manifest, indent=2))
    session = _session(root)
    _fit(session, root, "run.jsonl", STEPS, snapshot_every=8)
    session.save_adapter(root / "adapter")
    _fit(_session(root), root, "part.jsonl", 7, snapshot_every=5)
    warm = _session(root)
    warm.load_adapter(root / "adapter")
    _fit(warm, root, "more.jsonl", 4, snapshot_every=None)
    return root


def _in_format_2(program: bytes) -> tuple[bytes, dict[str, Any]]:
    """The program with its manifest in format 2, which without the indentation is no longer than before."""
    start = program.index(b'{\n  "format": "mobizo"')
    manifest, size = json.JSONDecoder().raw_decode(program[start : start + (1 << 16)].decode("latin-1"))
    manifest["format_version"] = 2
    manifest["application"]["tokenizer_sha256"] = hashes(FILES / "portable.tokenizer")
    text = json.dumps(manifest, separators=(",", ":")).encode().ljust(size)
    assert len(text) == size
    return program[:start] + text + program[start + size :], manifest


def _session(root: Path):
    from runtime_driver import Session

    return Session(root / "model.pte")


def _fit(session, root: Path, journal: str, steps: int, snapshot_every: int | None) -> None:
    """As `mobizo train` does it."""
    from mobizo_cli.data import ExampleBatches
    from mobizo_cli.loaded_program import open_task
    from runtime_driver import Constant

    use = open_task(root / "model.pte")
    batches = ExampleBatches(use.examples(root / "train.jsonl"), use.encoder, session.manifest.batch.size, 0)
    path = root / journal
    session.fit(batches, steps, lr=Constant(0.05), eps=1e-2, journal=path, snapshot_every=snapshot_every)


def run(root: Path, command: tuple[str, ...], *, fresh: bool = True) -> Ended:
    """Run a command in this process, without an earlier one's output if ``fresh``."""
    from mobizo_cli.main import run as mobizo

    if fresh:
        shutil.rmtree(root / OUT, ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    code, fault = 0, None
    with (
        contextlib.chdir(root),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        try:
            mobizo(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what we are looking for
            fault = f"traceback: {type(error).__name__}: {error}"
    weights = root / OUT / "adapter_model.safetensors"
    lines = err.getvalue().splitlines()
    if code and not any(line.startswith("mobizo: error: ") for line in lines):
        fault = fault or f"exit code {code} without a line that says why"
    return Ended(
        code, _lasting(out.getvalue()) + err.getvalue(), weights.read_bytes() if weights.exists() else None, fault
    )


def _lasting(text: str) -> str:
    """What a command says of its result, without what it says of this machine."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("time", "peak memory")))


def judge(expected: Ended, found: Ended) -> str | None:
    """What is wrong with how a command ended on a damaged file, or None."""
    if found.fault is not None:
        return found.fault
    if found.code == 0 and found.adapter != expected.adapter and found.said == expected.said:
        return "silently different"
    return None
