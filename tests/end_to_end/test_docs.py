"""Every command and every Python snippet in the README and in docs/ is executed.

Python blocks of one document run in order, as one program, in an empty directory. Commands run one by one in an empty
directory too, after the substitutions of `SHORTENED`; a command in no table runs as it is written. Nothing is skipped:
a fence in a language this file does not know is a failure.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# Fences that show something and are not to be executed.
SHOWN = {"text", "json", "mermaid"}
STAMPS = [f"-o {sys.prefix}/.mobizo-{name}-ready" for name in ("demo", "test")]
COLD_MAKE = f"make -C {ROOT} VENV={sys.prefix} {' '.join(STAMPS)}"
MAKE = f"{COLD_MAKE} BIN=$WARM"

# A command as it stands in a document -> the shorter one that runs here. The interpreter's own environment stands in
# for .venv, which make would only build again.
SHORTENED = {
    # With the programs of a small model, compiled with the demo's own code. It starts processes of its own.
    "make demo": f'{COLD_MAKE} demo DEMO_ARGS="--steps 4 --eval-size 8 --programs $PROGRAMS --out $PWD/out"',
    "make bench": f'{MAKE} bench BENCH_ARGS="--rounds 1 --only backprop-eager --out $PWD/out"',
    # One eager contender, and a small model: compiling the others takes minutes.
    "python benchmarks/time_to_accuracy.py": (
        f"python {ROOT}/benchmarks/time_to_accuracy.py --only backprop-eager --tasks sentiment --budget 0.1 --seeds 1 "
        "--evaluations 1 --eval-size 4 --out $PWD/out && test -s out/time_to_accuracy.svg"
    ),
    # Running every test from inside a test would not end: collecting them shows that the command finds them.
    "make test": f"{MAKE} test PYTEST_ARGS='--collect-only --quiet -n 0'",
    "make test-deep": f"{MAKE} test-deep DEEP=tests/graphs PYTEST_ARGS='--collect-only --quiet -n 0'",
    "make install": f"{MAKE} install",
    # A Llama of the same family and with the same tokenizer, but with two narrow layers, and 32 of the sentences.
    "MODEL=$(python -m examples.packaged --data reviews)": "MODEL=$PWD/tiny-llama",
    'mobizo plan "$MODEL" --data reviews/train.csv --optimizer adamw --max-memory 1.5GiB': (
        'mobizo plan "$MODEL" --data reviews/train.csv --layers 1 --estimators exact --no-measure --max-memory 1.5GiB'
    ),
    'mobizo inspect "$MODEL" --layers 15-29 --graph step.html': (
        'mobizo inspect "$MODEL" --layers 1 --graph step.html'
    ),
    'mobizo lower "$MODEL" --layers 15-29 --template "{text} It was" --labels "0= terrible,1= great" -o model.pte': (
        'mobizo lower "$MODEL" --layers 1 --template "{text} It was" --labels "0= terrible,1= great" -o model.pte'
    ),
    (
        'mobizo lower "$MODEL" --layers 15-29 --template "{text} It was" --labels "0= terrible,1= great" --target qnn '
        "--option soc=SM8650 -o phone.pte"
    ): (
        'mobizo lower "$MODEL" --layers 1 --template "{text} It was" --labels "0= terrible,1= great" --target qnn '
        "--option soc=SM8650 -o phone.pte"
    ),
    "mobizo train model.pte --data reviews/train.csv --steps 400 --lr 1e-2 --journal run.jsonl --adapter-out adapter": (
        "mobizo train model.pte --data reviews/train.csv --steps 4 --lr 1e-2 --journal run.jsonl --adapter-out adapter"
    ),
    (
        "torchrun --standalone --nproc-per-node 4 -m mobizo_cli train model.pte --data reviews/train.csv --steps 400 "
        "--lr 1e-2 --parallel data --journal fleet.jsonl --adapter-out fleet"
    ): (
        "torchrun --standalone --nproc-per-node 2 -m mobizo_cli train model.pte --data reviews/train.csv --steps 2 "
        "--lr 1e-2 --parallel data --journal fleet.jsonl --adapter-out fleet"
    ),
    "python benchmarks/fleet_traffic.py model.pte": (
        f'python {ROOT}/benchmarks/fleet_traffic.py "$PROGRAMS/forward-only.pte"'
    ),
    # One model and one target, into a copy: each program takes seconds, the whole table minutes.
    "python benchmarks/targets.py --full --write docs/targets.md": (
        f"cp {ROOT}/docs/targets.md . && python {ROOT}/benchmarks/targets.py --only BERT --target portable "
        "--write targets.md && grep -q 'BERT | portable' targets.md"
    ),
    "python benchmarks/step_profile.py model.pte": (
        f'python {ROOT}/benchmarks/step_profile.py "$PROGRAMS/forward-only.pte" --rounds 1'
    ),
    # These rewrite or judge the checkout, and .ci/run runs them; here it is shown that the targets exist.
    "make docs": f"{MAKE} --dry-run docs",
    "make format": f"{MAKE} --dry-run format",
    "make lint": f"{MAKE} --dry-run lint",
    "make replay": f'{MAKE} replay REPLAY_ARGS="--only one-lora-layer-x-a-b-stored --out $PWD/replay"',
    ".venv/bin/python -m pytest tests/passes": f"{sys.executable} -m pytest --collect-only --quiet {ROOT}/tests/graphs",
    '.venv/bin/python -m pytest -m "not real_model"': (
        f'{sys.executable} -m pytest --collect-only --quiet -m "not real_model" {ROOT}/tests/end_to_end/test_docs.py'
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """Every fenced block of a Markdown file, indented ones included."""
    found = []
    lines = document.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        opening = re.match(r"^(\s*)(`{3,}|~{3,})(.*)$", lines[index])
        index += 1
        if opening is None:
            continue
        indent, fence, language = opening.groups()
        start, body = index, []
        while index < len(lines) and lines[index].strip() != fence:
            body.append(lines[index].removeprefix(indent))
            index += 1
        assert index < len(lines), f"{document}:{start}: fence is never closed"
        index += 1
        found.append(Block(document, start, language.strip(), "\n".join(body) + "\n"))
    return found


ALL_BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


def commands(block: Block) -> list[str]:
    """The commands of a shell block: one a line, a trailing backslash joins lines, comments dropped."""
    text = block.text.replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


def run(command: list[str] | str, where: Path, warm: Path, variables: Mapping[str, str] = {}) -> None:
    """Run a command in `where`, `warm` and our interpreter's scripts first in PATH; its output is shown if it fails."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(warm), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "WARM": str(warm),
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        executable="/bin/bash" if isinstance(command, str) else None,
        cwd=where,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_every_fence_has_a_known_language():
    unknown = [f"{block}: {block.language!r}" for block in ALL_BLOCKS if block.language not in SHOWN | {"python", "sh"}]
    assert not unknown


def test_every_shortened_command_still_stands_in_a_document():
    written = {command for block in ALL_BLOCKS if block.language == "sh" for command in commands(block)}
    assert set(SHORTENED) <= written


PYTHON_DOCUMENTS = sorted({block.document for block in ALL_BLOCKS if block.language == "python"})


@pytest.mark.parametrize("document", PYTHON_DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_snippets_run(document: Path, tmp_path: Path, warm: Path):
    program = "".join(
        # Blank lines in front keep line numbers, so that a traceback points into the document.
        "\n" * max(0, block.line - before) + block.text
        for before, block in _with_offsets([b for b in blocks(document) if b.language == "python"])
    )
    script = tmp_path / f"{document.stem}.py"
    script.write_text(program, encoding="utf-8")
    run([str(warm / "python"), "-W", "ignore", str(script)], tmp_path, warm)


def _with_offsets(found: list[Block]) -> list[tuple[int, Block]]:
    offsets, position = [], 0
    for block in found:
        offsets.append((position, block))
        position = max(position, block.line) + block.text.count("\n")
    return offsets


def part_of(block: Block, other: Block) -> bool:
    """Whether the commands of `block` all stand in `other`, in the same order, among more, or are those of `other`."""
    rest = iter(commands(other))
    longer = (len(commands(block)), str(block)) < (len(commands(other)), str(other))
    return longer and all(command in rest for command in commands(block))


ALL_SHELL_BLOCKS = [block for block in ALL_BLOCKS if block.language == "sh"]
# What runs as part of a longer block of another document need not run twice: compiling takes most of the time here.
SHELL_BLOCKS = [block for block in ALL_SHELL_BLOCKS if not any(part_of(block, other) for other in ALL_SHELL_BLOCKS)]


def shell_script(block: Block) -> str:
    """One shell for the block, so that a variable set in one line is there in the next; stops at the first failure."""
    return "\n".join(["set -euo pipefail", *(SHORTENED.get(command, command) for command in commands(block))])


@pytest.mark.real_model
@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_commands_run(block: Block, tmp_path: Path, command_files: Path, warm: Path, request: pytest.FixtureRequest):
    shutil.copytree(command_files, tmp_path, dirs_exist_ok=True)
    listed, script = commands(block), shell_script(block)
    assert listed, f"{block} holds no command"
    # What the examples and benchmarks take in place of the packaged model.
    variables = {"MOBIZO_DEMO_MODEL": str(command_files / "tiny-llama")}
    if "$PROGRAMS" in script:
        variables["PROGRAMS"] = str(request.getfixturevalue("small_programs"))
    run(script, tmp_path, warm, variables)
    if "make demo" in listed:
        left = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
        wanted = {f"{way}/{name}" for way in ("exact", "forward-only") for name in ("adapter", "journal.jsonl")}
        assert {*wanted, "curve.png"} <= {str(path) for path in left}
    if "make bench" in listed:
        assert (tmp_path / "out" / "step_time.json").is_file()
