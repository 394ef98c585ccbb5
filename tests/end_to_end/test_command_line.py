"""The `mobizo` command on the real model: what `inspect` must tell about the demo's model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.packaged import model_directory

pytestmark = pytest.mark.real_model

MOBIZO = Path(sys.executable).with_name("mobizo")


def run(*arguments: str) -> str:
    # Wide, so that no table is wrapped.
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([MOBIZO, *arguments], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_inspect_prints_sites_passes_and_the_share_computed_once():
    out = run("inspect", str(model_directory()), "--layers", "15-29")
    sites = re.findall(r"layers\.(\d+)\.self_attn\.(q_proj|v_proj)", out)
    assert {int(layer) for layer, _ in sites} == set(range(15, 30))
    assert "30 LoRA sites" in out
    passes = dict(re.findall(r"([a-z]+(?:-[a-z]+)+)\W+(\d+)", out))
    assert passes["insert-mp-lora"] == "30"
    assert int(passes["expand-perturbations"]) > 30
    share = re.search(r"computed once\W+(\d+\.\d)%", out)
    assert share, out
    # 15 of 30 layers lie below the first LoRA, and of layer 15 the norm and the projections that feed its LoRA.
    assert 45 < float(share[1]) < 60


def test_a_wrong_model_path_is_one_line(tmp_path: Path):
    done = subprocess.run([MOBIZO, "inspect", str(tmp_path / "nothing")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
