"""The manifest's reader: every fault is a typed error that names its field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_driver.format import Manifest, ManifestError, ManifestVersionError
from tests.driver import tiny


def test_round_trip():
    manifest = Manifest.from_dict(tiny.manifest_dict(application={"template": "é {text}"}))
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.to_json().isascii()
    assert manifest.application["template"] == "é {text}"
    assert [tensor.fqn for tensor in manifest.trainable_adapter] == [tiny.FQN_B]
    assert [tensor.fqn for tensor in manifest.frozen_adapter] == [tiny.FQN_A]


def inside() -> dict:
    """The manifest of a program that holds its adapter inside."""
    data = json.loads(json.dumps(tiny.manifest_dict(adapter_state="internal")))
    for side in ("inputs", "outputs"):
        items = data["methods"]["step"][side]
        data["methods"]["step"][side] = [item for item in items if item["role"] != "adapter"]
    return data


def test_a_manifest_without_the_field_has_its_adapter_outside():
    assert "adapter_state" not in tiny.manifest_dict()
    assert Manifest.from_dict(tiny.manifest_dict()).adapter_state == "external"


def test_a_manifest_that_still_has_quantize_opens_and_loses_it():
    manifest = Manifest.from_dict(tiny.manifest_dict(quantize=None))
    assert "quantize" not in manifest.to_dict()
    assert manifest.backend is None


def test_an_adapter_inside():
    manifest = Manifest.from_dict(inside())
    assert manifest.adapter_state == "internal"
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_an_adapter_inside_is_not_passed_to_the_step_too():
    with pytest.raises(ManifestError, match=r"expected 0, found 1") as caught:
        Manifest.from_dict(tiny.manifest_dict(adapter_state="internal"))
    assert caught.value.field == "methods.step.inputs"
    with pytest.raises(ManifestError, match=r"expected 1, found 0"):
        Manifest.from_dict({**inside(), "adapter_state": "external"})


def test_an_adapter_inside_needs_apply():
    data = inside()
    del data["methods"]["apply"]
    with pytest.raises(ManifestError, match="expected a method `apply`: an adapter inside"):
        Manifest.from_dict(data)


def edit(path: str, value: object) -> dict:
    # Through JSON, so that equal parts are not one shared object.
    data = json.loads(json.dumps(tiny.manifest_dict()))
    *parents, last = path.split(".")
    place: object = data
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]  # type: ignore[index]
    key = int(last) if isinstance(place, list) else last
    if value is DELETED:
        del place[key]  # type: ignore[attr-defined]
    else:
        place[key] = value  # type: ignore[index]
    return data


DELETED = object()


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        ("format", "onnx", "format", "expected 'mobizo', found 'onnx'"),
        ("program_id", DELETED, "program_id", "is required"),
        ("color", 1, "color", "not a field of format versions 1 to 2"),
        ("batch.size", 0, "batch.size", "found 0"),
        ("batch.inputs", "x", "batch.inputs", "found 'x'"),
        ("batch.label_inputs", ["y"], "batch.label_inputs", "`y` is not one of"),
        ("estimator.kind", "Three-sided", "estimator.kind", "found 'Three-sided'"),
        ("estimator.perturbed_groups", [9], "estimator.perturbed_groups", "group 9 is beyond estimator.groups, 4"),
        ("estimator.normalize", True, "estimator.normalize", "found True"),
        ("adapter_state", "inside", "adapter_state", "found 'inside'"),
        ("estimator.queries", 3, "methods.step.outputs", "estimator.queries is 3"),
        ("adapter", [], "adapter", "at least one trainable"),
        ("adapter.1.trainable", True, "methods.step.inputs", "expected 2, found 1"),
        ("adapter.0.trainable", False, "adapter", "at least one trainable"),
        ("adapter.1.fqn", tiny.FQN_B, "adapter", "must be unique"),
        ("adapter.0.dtype", "complex64", "adapter.0.dtype", "found 'complex64'"),
        ("adapter.0.shape", [3, -1], "adapter.0.shape.1", "found -1"),
        ("methods.step", DELETED, "methods", "expected a method `step`"),
        ("methods.backward", {"inputs": [], "outputs": []}, "methods.backward", "expected one of"),
        ("methods.step.inputs.0.name", "other", "methods.step.inputs", "first difference"),
        ("methods.loss.outputs", [], "methods.loss.outputs", "exactly one tensor with role `loss`, found 0"),
        ("methods.logits.inputs.1.name", "pixels", "methods.logits.inputs", "`pixels` is not one of"),
    ],
)
def test_fault_names_its_field(path: str, value: object, field: str, message: str):
    with pytest.raises(ManifestError) as caught:
        Manifest.from_dict(edit(path, value))
    assert caught.value.field == field
    assert message in str(caught.value)


@pytest.mark.parametrize("version", [0, 3, None, "1", True, 1.0])
def test_other_versions(version: object):
    with pytest.raises(ManifestVersionError, match="expected 1 or 2, found") as caught:
        Manifest.from_dict(tiny.manifest_dict(format_version=version))
    assert caught.value.found == version


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_not_a_json_object(text: str):
    with pytest.raises(ManifestError, match=r"expected (a JSON object|JSON)"):
        Manifest.from_json(text)


def test_missing_file(tmp_path: Path):
    with pytest.raises(ManifestError, match="cannot read"):
        Manifest.load(tmp_path / "model.json")


def test_needs_no_torch():
    code = "import sys, runtime_driver.format; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
