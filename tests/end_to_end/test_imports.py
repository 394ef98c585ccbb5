"""Who may import whom (ADR 1): checked in the source, lazy imports included, and in a fresh interpreter."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"mobizo_passes", "mobizo_manifest", "mobizo_qnn", "lowering", "runtime_driver", "mobizo_cli"}
HUB = {"transformers", "peft", "accelerate", "gguf"}

# package -> what none of its files may import, anywhere, not even inside a function
FORBIDDEN = {
    "mobizo_passes": (OURS - {"mobizo_passes"}) | HUB | {"executorch", "pydantic", "rich", "typer", "safetensors"},
    "mobizo_manifest": (OURS - {"mobizo_manifest"}) | HUB | {"executorch", "torch", "rich", "typer", "safetensors"},
    "mobizo_qnn": (OURS - {"mobizo_qnn"}) | HUB | {"rich", "typer", "safetensors"},
    "lowering": {"runtime_driver", "mobizo_cli", "typer"} | HUB,
    "runtime_driver": {"mobizo_passes", "lowering", "mobizo_cli", "typer"} | HUB,
    "mobizo_cli": {"examples", "benchmarks", "tests"},
}

# The one file that asks PEFT how an adapter is saved, and then only if the model is PEFT's; PEFT brings safetensors.
ALLOWED = {"mobizo_passes/peft_files.py": {"peft", "safetensors"}}

# package -> what importing it must not load
NOT_LOADED = {
    "mobizo_passes": HUB | {"executorch", "pydantic", "runtime_driver", "lowering"},
    "mobizo_manifest": HUB | {"torch", "executorch"},
    "mobizo_qnn": HUB | {"torch", "executorch"},
    "lowering": HUB | {"runtime_driver"},
    "runtime_driver": HUB | {"mobizo_passes", "lowering", "matplotlib"},
    "mobizo_cli.main": HUB | {"torch", "executorch", "mobizo_passes", "lowering", "runtime_driver"},
}


def imported_packages(path: Path) -> dict[str, int]:
    """Top-level names of absolute imports in a file, with the line of the first."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            found.setdefault(name.partition(".")[0], node.lineno)
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_file_imports_what_its_package_must_not_know(package: str):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources, f"no source found for {package}"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources
        for name, line in imported_packages(path).items()
        if name in FORBIDDEN[package] - ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    ]
    assert not wrong


@pytest.mark.parametrize("module", NOT_LOADED)
def test_importing_a_package_loads_no_more_than_it_needs(module: str):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not NOT_LOADED[module] & set(result.stdout.split())


def test_every_package_of_ours_is_covered():
    listed = set(FORBIDDEN)
    assert listed == OURS
    assert all(importlib.util.find_spec(package) for package in OURS)
