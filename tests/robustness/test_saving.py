"""Saving a program: nothing of others is lost; a writer killed at any moment leaves the old program or the new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lowering.errors import OutputNotOurs
from lowering.executorch_compat.tags import TAG
from lowering.executorch_compat.weights import Weight, serialized
from lowering.saving import check_output, save, staging
from mobizo_cli import tokenizer_files
from mobizo_cli.errors import ModelError, OptionError
from runtime_driver.errors import WeightsFileError
from runtime_driver.format import Manifest, WeightsFileSpec
from runtime_driver.program import LoadedProgram
from runtime_driver.weights_file import find_weights

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"


def weights(content: bytes) -> bytes:
    """A real weights file with one weight."""
    return bytes(serialized({f"{hashlib.sha256(content).hexdigest()} float32[1]": Weight(content)}, TAG))


class Version:
    """One of two programs with other bytes in every file."""

    def __init__(self, name: str, number: int) -> None:
        self.program = (FIXTURES / f"{name}.pte").read_bytes()
        self.manifest = (FIXTURES / f"{name}.json").read_bytes()
        self.id = Manifest.from_json(self.manifest).program_id
        self.weights = weights(bytes([number] * 4))
        self.spec = WeightsFileSpec(sha256=hashlib.sha256(self.weights).hexdigest(), bytes=len(self.weights))
        self.files = {"tokenizer.json": f'{{"model": {number}}}', "tokenizer_config.json": f"{{}}{number}"}
        self.hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.files.items()}

    def write(self, target: Path) -> None:
        """As `mobizo lower` does."""
        with staging(target) as aside:
            (aside / "tokenizer").mkdir()
            for name, text in self.files.items():
                (aside / "tokenizer" / name).write_text(text)
            with tokenizer_files.placed(aside / "tokenizer", target.with_suffix(".tokenizer"), aside):
                save(
                    target,
                    lambda file: file.write(self.program),
                    lambda: self.manifest,
                    lambda file: file.write(self.weights),
                    self.spec.sha256,
                )

    def check(self, target: Path) -> None:
        """Opens, with its own manifest, weights and tokenizer."""
        assert LoadedProgram(target).manifest.program_id == self.id
        find_weights(target, self.spec, None)
        directory = tokenizer_files.find(target, f"{target.stem}.tokenizer", self.hashes)
        assert (directory / "tokenizer.json").is_file()
        tokenizer_files.check(directory, self.hashes)


FILES = {"m.pte", "m.json", "m.ptd", "m.tokenizer"}
OLD, NEW = Version("portable", 1), Version("xnnpack", 2)


def killed(work: Callable[[], None], moves: int) -> bool:
    """Run `work` in a process that kills itself before its move number `moves`; whether it came to that."""
    child = os.fork()
    if not child:
        done = 0

        def counted(path: Path, target: Path, replace: Callable = Path.replace) -> Path:
            nonlocal done
            if done == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return replace(path, target)

        Path.replace = counted  # pyright: ignore[reportAttributeAccessIssue]
        status = 1
        with suppress(BaseException):
            work()
            status = 0
        os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("there", [True, False])
def test_killed_at_every_moment(tmp_path: Path, there: bool):
    target = tmp_path / "m.pte"
    moves = -1
    for moves in range(20):
        for entry in tmp_path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if there:
            OLD.write(target)
        if not killed(lambda: NEW.write(target), moves):
            break
        if target.exists():
            (OLD if LoadedProgram(target).manifest.program_id == OLD.id else NEW).check(target)
        else:
            assert not there
        # What the killed one left is gone after the next one, whichever that is.
        (OLD if moves % 2 else NEW).write(target)
        assert {path.name for path in tmp_path.iterdir()} == FILES
        (OLD if moves % 2 else NEW).check(target)
    assert moves == (8 if there else 4)
    NEW.check(target)


def test_a_writer_at_work_keeps_its_directory_and_strangers_keep_theirs(tmp_path: Path):
    strange = [".mobizo-m.pte-UPPERCASE", ".mobizo-n.pte-abcdefgh", ".mobizo-abcdefgh", ".m.pte.part", "m.tokenizers"]
    for name in strange:
        (tmp_path / name).mkdir()
    (tmp_path / ".mobizo-abcdefgh" / "notes").touch()
    left = [".mobizo-m.pte-abcdefgh", ".mobizo-m.pte-abcdefgi"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "program").touch()
    (tmp_path / ".mobizo-m.pte-abcdefgj").symlink_to(tmp_path / "m.tokenizers")
    (tmp_path / ".mobizo-hijklmno").mkdir()  # of version 0.1
    (tmp_path / ".mobizo-hijklmno" / "m.tokenizer").mkdir()
    (tmp_path / ".m.json.abcdefgh.part").touch()
    with staging(tmp_path / "m.pte") as at_work:
        OLD.write(tmp_path / "m.pte")
        assert at_work.is_dir()
        kept = FILES | {*strange, at_work.name, ".mobizo-m.pte-abcdefgj"}
        assert {path.name for path in tmp_path.iterdir()} == kept


TAKEN: dict[str, Callable[[Path], object]] = {
    "a directory": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "an empty directory": lambda path: path.mkdir(),
    "notes": lambda path: path.write_text("mine"),
    "other JSON": lambda path: path.write_text('{"format": "mine"}'),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
    "the head of a program": lambda path: path.write_bytes(OLD.program[:32]),
    "a program of others": lambda path: path.write_bytes(OLD.program.replace(b"mobizo_manifest", b"others_manifest")),
    "a link": lambda path: path.symlink_to(FIXTURES / f"portable{path.suffix}"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a pipe": os.mkfifo,
}


def state(directory: Path) -> dict[str, object]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else path.lstat().st_mode
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize("suffix", [".pte", ".json", ".ptd"])
@pytest.mark.parametrize("what", TAKEN)
def test_what_is_not_ours_stays(tmp_path: Path, suffix: str, what: str):
    OLD.write(tmp_path / "m.pte")
    (tmp_path / "m").with_suffix(suffix).unlink()
    TAKEN[what]((tmp_path / "m").with_suffix(suffix))
    before = state(tmp_path)
    with pytest.raises(OutputNotOurs, match="will not be replaced"):
        NEW.write(tmp_path / "m.pte")
    assert state(tmp_path) == before


def test_names_of_the_files_beside_it_are_no_names_for_a_program(tmp_path: Path):
    for name in ("m.json", "m.ptd"):
        with pytest.raises(OutputNotOurs, match="beside the program"):
            check_output(tmp_path / name, weights=False)


@pytest.mark.parametrize("name", ["notes.txt", "sub/tokenizer.json", "tokenizer.json/x", "additional_chat_templates"])
def test_a_tokenizers_directory_with_other_files_stays(tmp_path: Path, name: str):
    OLD.write(tmp_path / "m.pte")
    path = tmp_path / "m.tokenizer" / name
    if path.parent.is_file():
        path.parent.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = state(tmp_path)
    with pytest.raises(OptionError, match=r"m\.tokenizer"):
        NEW.write(tmp_path / "m.pte")
    assert state(tmp_path) == before


def test_a_failure_in_the_midst_puts_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    OLD.write(tmp_path / "m.pte")
    before = state(tmp_path)
    replace = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if target == tmp_path / "m.pte":
            raise PermissionError("no")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(PermissionError):
        NEW.write(tmp_path / "m.pte")
    assert state(tmp_path) == before


def test_another_tokenizer_or_weights_file_is_refused(tmp_path: Path):
    OLD.write(tmp_path / "m.pte")
    for file, swapped in (("tokenizer.json", '{"model": 2}'), ("tokenizer_config.json", "{}")):
        path = tmp_path / "m.tokenizer" / file
        own = path.read_text()
        path.write_text(swapped)
        with pytest.raises(ModelError, match=f"not the tokenizer .*{file}"):
            tokenizer_files.check(tmp_path / "m.tokenizer", OLD.hashes)
        path.write_text(own)
    (tmp_path / "m.ptd").write_bytes(NEW.weights)
    with pytest.raises(WeightsFileError, match="SHA-256"):
        find_weights(tmp_path / "m.pte", OLD.spec, None)


def test_a_tokenizer_out_of_the_programs_directory_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "m.tokenizer").symlink_to(tmp_path / "out")
    with pytest.raises(ModelError, match="leads out of the program's directory"):
        tokenizer_files.find(tmp_path / "in" / "m.pte", "m.tokenizer", {})
