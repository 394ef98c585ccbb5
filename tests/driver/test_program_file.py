"""Files that are not what they should be end in a typed error, never in a crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runtime_driver
from runtime_driver import ProgramFileError, Session
from runtime_driver.format import Manifest, ManifestError, ManifestVersionError
from tests.driver import tiny


def test_missing_file(tmp_path: Path):
    with pytest.raises(ProgramFileError, match="no such file"):
        Session(tmp_path / "model.pte")


def test_directory(tmp_path: Path):
    with pytest.raises(ProgramFileError, match="cannot be read"):
        Session(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"hello " * 100, bytes(4096), b"\x3c\0\0\0ET12", b"\x3c\0\0\0ETxxeh00" * 9]
)
def test_not_a_pte(tmp_path: Path, content: bytes):
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(ProgramFileError, match=r"not a \.pte file|truncated"):
        Session(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(built_pte: Path, tmp_path: Path, share: float):
    whole = built_pte.read_bytes()
    path = tmp_path / "cut.pte"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ProgramFileError, match=r"truncated|not a \.pte file"):
        Session(path)


def test_damaged_flatbuffer(pte: Path):
    data = bytearray(pte.read_bytes())
    data[200:1200] = bytes(byte ^ 255 for byte in data[200:1200])
    pte.write_bytes(bytes(data))
    with pytest.raises(ProgramFileError, match="damaged: expected SHA-256"):
        Session(pte)
    with pytest.raises(ProgramFileError, match="the ExecuTorch runtime refuses it"):
        Session(pte, verify=False)


def test_a_pte_of_somebody_else(tmp_path: Path):
    import torch
    from executorch.exir import to_edge

    program = to_edge(torch.export.export(torch.nn.ReLU(), (torch.ones(2),))).to_executorch()
    path = tmp_path / "relu.pte"
    path.write_bytes(program.buffer)
    with pytest.raises(ProgramFileError, match=r"no `mobizo_manifest` inside, only \['forward'\]"):
        Session(path)


def with_manifest(path: Path, **changes) -> Path:
    return tiny.build(path, manifest=json.dumps(tiny.manifest_dict(**changes)), methods=("step", "apply"))


def test_manifest_of_a_later_version(tmp_path: Path):
    with pytest.raises(ManifestVersionError, match="expected 1 or 2, found 3"):
        Session(with_manifest(tmp_path / "model.pte", format_version=3))


def test_manifest_that_describes_absent_methods(tmp_path: Path):
    with pytest.raises(ProgramFileError, match=r"describes \['logits', 'loss'\]"):
        Session(with_manifest(tmp_path / "model.pte"))


def test_method_left_out(tmp_path: Path):
    methods = {name: spec for name, spec in tiny.manifest_dict()["methods"].items() if name in ("step", "apply")}
    session = Session(with_manifest(tmp_path / "model.pte", methods=methods))
    session.fit(tiny.make_batches(1), 1, lr=0.1, eps=0.1)
    with pytest.raises(runtime_driver.MissingMethodError, match="no method `loss`"):
        session.evaluate(tiny.make_batches(1))
    with pytest.raises(runtime_driver.MissingMethodError, match="no method `logits`"):
        session.predict(tiny.make_batches(1)[0])


def test_initial_adapter_that_is_not_the_manifests(tmp_path: Path):
    manifest = tiny.manifest_dict()
    manifest["adapter"] = manifest["adapter"][:1]
    with pytest.raises(runtime_driver.AdapterError, match="returns 2 tensors"):
        Session(tiny.build(tmp_path / "model.pte", manifest=json.dumps(manifest)))


def test_sidecar(pte: Path):
    sidecar = pte.with_suffix(".json")
    sidecar.write_text(Manifest.from_dict(tiny.manifest_dict()).to_json(indent=2))
    Session(pte)
    sidecar.write_text(Manifest.from_dict(tiny.manifest_dict(program_id="tiny-2")).to_json())
    with pytest.raises(runtime_driver.SidecarMismatchError, match="field `program_id` is 'tiny-2'"):
        Session(pte)
    sidecar.write_text("{")
    with pytest.raises(ManifestError, match="does not parse"):
        Session(pte)
