"""A program's bytes are those that were written, or the program is refused before the runtime sees it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime_driver import (
    ProgramFileError,
    Session,
    SidecarMismatchError,
    UnprovenWarning,
    WeightsFileError,
)
from runtime_driver import program as program_module
from runtime_driver.format import ManifestError
from runtime_driver.format.footer import (
    FOOTER_BYTES,
    FooterError,
    check_footer,
    with_footer,
    write_with_footer,
)
from tests.driver import tiny
from tests.driver.command import Cli, fails

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {"lr": 0.5, "eps": 1e-2}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the runtime fails the test."""

    def used(*arguments: object) -> None:
        raise AssertionError("the runtime saw the file")

    monkeypatch.setattr(program_module.LoadedProgram, "_map", used)


@pytest.mark.usefixtures("blind")
def test_no_flipped_bit_reaches_the_runtime(pte: Path):
    whole, chance = pte.read_bytes(), random.Random(0)
    footer = range(len(whole) - FOOTER_BYTES, len(whole))
    for place in [*range(8), *footer, *(chance.randrange(len(whole)) for _ in range(200))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        pte.write_bytes(damaged)
        with pytest.raises(ProgramFileError, match=r"damaged|not a \.pte file|truncated"):
            Session(pte)


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-FOOTER_BYTES],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-4096] + bytes(4096),
        lambda data: data[:-FOOTER_BYTES] + b"more" + data[-FOOTER_BYTES:],
        lambda data: data + data[-FOOTER_BYTES:],
    ],
    ids=["no footer", "a byte less", "a byte more", "zeros at the end", "bytes before the footer", "two footers"],
)
def test_damage_around_the_seal(pte: Path, change):
    pte.write_bytes(change(pte.read_bytes()))
    with pytest.raises(ProgramFileError, match="damaged"):
        Session(pte)


@pytest.mark.usefixtures("blind")
def test_a_seal_of_a_later_version(pte: Path):
    data = bytearray(pte.read_bytes())
    data[-12:-8] = struct.pack("<I", 2)
    pte.write_bytes(data)
    with pytest.raises(ProgramFileError, match="its footer is of version 2, this release knows version 1"):
        Session(pte)


def test_an_unverified_program_is_opened_as_it_is(pte: Path):
    pte.write_bytes(pte.read_bytes()[:-FOOTER_BYTES])
    assert Session(pte, verify=False).fit(tiny.make_batches(1), 1, **RUN).steps == 1


def with_text(path: Path, old: bytes, new: bytes) -> bytes:
    """Write the program with another text of the same length in its manifest; return its bytes without the footer."""
    program = path.read_bytes()[:-FOOTER_BYTES]
    assert program.count(old) == 1
    assert len(old) == len(new)
    changed = program.replace(old, new)
    path.write_bytes(with_footer(changed))
    return changed


def test_format_1_has_no_seal_and_that_is_said_once(pte: Path):
    program = with_text(pte, b'"format_version": 2', b'"format_version": 1')
    Session(pte)  # a footer of its own: there is nothing to say
    pte.write_bytes(program)
    with pytest.warns(UnprovenWarning, match="written in format 1") as told:
        Session(pte).fit(tiny.make_batches(1), 2, **RUN)
    assert len(told) == 1


def test_what_was_sealed_is_what_was_written():
    buffer = io.BytesIO()
    found = write_with_footer(buffer, lambda file: [file.write(b"a" * 3_000_000), file.write(b"b")])
    assert buffer.getvalue() == with_footer(b"a" * 3_000_000 + b"b")
    assert found.bytes == len(buffer.getvalue())


@pytest.mark.parametrize("content", [b"", b"a", b"a" * (FOOTER_BYTES - 1), b"a" * 3_000_000])
def test_checking_a_seal(tmp_path: Path, content: bytes):
    def check(data: bytes):
        (tmp_path / "file").write_bytes(data)
        descriptor = os.open(tmp_path / "file", os.O_RDONLY)
        try:
            return check_footer(descriptor)
        finally:
            os.close(descriptor)

    assert not check(content).has_footer
    assert check(with_footer(content)).has_footer
    if content:
        with pytest.raises(FooterError, match="expected SHA-256"):
            check(with_footer(content).replace(b"a", b"b", 1))


def test_the_manifest_beside_a_program_knows_its_hash(pte: Path):
    def beside(**changes: object) -> None:
        spec = {"sha256": "0" * 64, "bytes": pte.stat().st_size, **changes}
        pte.with_suffix(".json").write_text(json.dumps(tiny.manifest_dict(program_file=spec)))

    right = hashlib.sha256(pte.read_bytes()).hexdigest()
    beside(sha256=right)
    Session(pte)
    beside()
    with pytest.raises(SidecarMismatchError, match="field `program_file`"):
        Session(pte)
    Session(pte, verify=False)
    beside(sha256=right, bytes=3)
    with pytest.raises(SidecarMismatchError, match="field `program_file`"):
        Session(pte)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    other.replace(path)


def touched(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [replaced, touched, Path.unlink])
def test_a_program_that_changes_under_a_session_is_noticed(pte: Path, change):
    session = Session(pte)
    session.fit(tiny.make_batches(1), 1, **RUN)
    change(pte)
    session.fit(tiny.make_batches(1), 1, **RUN)  # `step` is loaded, from the file as it was
    with pytest.raises(ProgramFileError, match="replaced or changed since this session opened it"):
        session.evaluate(tiny.make_batches(1))


@pytest.mark.parametrize("change", [replaced, touched, Path.unlink])
def test_weights_that_change_under_a_session_are_noticed(pte_with_weights_file: Path, change):
    session = Session(pte_with_weights_file)
    session.fit(tiny.make_batches(1), 1, **RUN)
    change(pte_with_weights_file.with_suffix(".ptd"))
    with pytest.raises(WeightsFileError, match="replaced or changed since it was checked"):
        session.evaluate(tiny.make_batches(1))


def test_no_verify_on_the_command_line(pte: Path, cli: Cli):
    pte.write_bytes(pte.read_bytes()[:-FOOTER_BYTES])
    fails(cli("export-adapter", pte, "-o", "out"), "damaged: the footer at its end is missing")
    assert cli("export-adapter", pte, "-o", "out", "--no-verify").code == 0
    fails(cli("inspect", pte), "damaged")
    assert cli("inspect", pte, "--no-verify").code == 0


def test_the_last_words_of_a_runtime_that_aborts(tmp_path: Path):
    """Standard error is captured while methods load; it must not be lost with the process."""
    code = """
import os
from runtime_driver.captured_output import captured_stderr
with captured_stderr("opening model.pte"):
    os.write(2, b"not seen\\n")
with captured_stderr("loading method `step` of model.pte"):
    os.write(2, b"E 00:00 kernel.cpp:7 no such operator\\n")
    os.abort()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -6
    assert done.stderr.splitlines() == [
        "mobizo: the process died while loading method `step` of model.pte; the last words of ExecuTorch's runtime:",
        "E 00:00 kernel.cpp:7 no such operator",
    ]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (b'"target": "port\xff\xfele"', "UTF-8"),
        (b'"target": "\\ud800al"', "lone surrogate"),
        (b'"model":  "portable"', "given twice"),
        (b'"target": NaN       ', "NaN is not JSON"),
    ],
)
def test_a_manifest_that_is_not_strict_json(pte: Path, new: bytes, message: str):
    with_text(pte, b'"target": "portable"', new)
    with pytest.raises(ManifestError, match=message):
        Session(pte)
