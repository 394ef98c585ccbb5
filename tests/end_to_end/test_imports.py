"""Who may import whom (ADR 1): checked in the source, lazy imports included, and in a fresh interpreter."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[2]
# The parts whose imports are held apart, the inner one of two nested ones first.
PARTS = (
    "runtime_driver/format",
    "runtime_driver/backends",
    "mobizo_passes",
    "lowering",
    "runtime_driver",
    "mobizo_cli",
)
PACKAGES = {part for part in PARTS if "/" not in part}
HUB = {"transformers", "peft", "accelerate", "gguf"}

# part -> what none of its files may import, anywhere, not even inside a function
FORBIDDEN = {
    "runtime_driver/format": PACKAGES | HUB | {"executorch", "torch", "rich", "typer", "safetensors"},
    "runtime_driver/backends": PACKAGES | HUB | {"rich", "typer", "safetensors"},
    "mobizo_passes": (PACKAGES - {"mobizo_passes"}) | HUB | {"executorch", "pydantic", "rich", "typer", "safetensors"},
    "lowering": {"runtime_driver", "mobizo_cli", "typer"} | HUB,
    "runtime_driver": {"mobizo_passes", "lowering", "mobizo_cli", "typer"} | HUB,
    "mobizo_cli": {"examples", "benchmarks", "tests"},
}

# Parts of a package that the others may import although they may not import the package.
SHARED = {"runtime_driver/format", "runtime_driver/backends"}
# The one file that asks PEFT how an adapter is saved, and then only if the model is PEFT's; PEFT brings safetensors.
ALLOWED = {"mobizo_passes/sites/peft.py": {"peft", "safetensors"}}

# module -> what importing it must not load
NOT_LOADED = {
    "mobizo_passes": HUB | {"executorch", "pydantic", "runtime_driver", "lowering"},
    "runtime_driver.format": HUB | {"torch", "executorch", "safetensors"},
    "runtime_driver.backends.qnn": HUB | {"torch", "executorch", "safetensors"},
    "lowering": HUB | {"torch", "executorch"},
    "runtime_driver": HUB | {"torch", "executorch", "mobizo_passes", "lowering", "matplotlib"},
    "mobizo_cli.main": HUB | {"torch", "executorch", "mobizo_passes", "lowering"},
}


def sources(part: str) -> list[Path]:
    """Files of a part, those of parts inside of it left out."""
    nested = [ROOT / other for other in PARTS if other.startswith(f"{part}/")]
    found = sorted((ROOT / part).rglob("*.py"))
    return [path for path in found if not any(path.is_relative_to(other) for other in nested)]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, with the line: of `from a import b`, `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def part_of(name: str, own: str) -> str:
    """What an import is judged as: "" for the part itself or a shared one, else the top-level name."""
    path = name.replace(".", "/")
    part = next((part for part in PARTS if f"{path}/".startswith(f"{part}/")), "")
    return "" if part == own or part in SHARED else name.partition(".")[0]


@pytest.mark.parametrize("part", FORBIDDEN)
def test_no_file_imports_what_its_package_must_not_know(part: str):
    assert sources(part), f"no source found for {part}"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(part)
        for name, line in imports(path)
        if part_of(name, part) in FORBIDDEN[part] - ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    ]
    assert not wrong


@pytest.mark.parametrize("module", NOT_LOADED)
def test_importing_a_package_loads_no_more_than_it_needs(module: str):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not NOT_LOADED[module] & set(result.stdout.split())


def test_every_package_of_ours_is_covered():
    assert set(FORBIDDEN) == set(PARTS)
    assert all(importlib.util.find_spec(package) for package in PACKAGES)
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert top - {"tests", "examples", "benchmarks"} == PACKAGES


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and for type checking count: a circle that is only hidden is one."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    graph = networkx.DiGraph()
    for module, path in modules.items():
        for name, _ in imports(path):
            imported = name if name in modules else name.rpartition(".")[0]
            if imported in modules and imported != module:
                graph.add_edge(module, imported)
    circles = [sorted(found) for found in networkx.strongly_connected_components(graph) if len(found) > 1]
    assert not circles


def test_the_ground_floor_stands_on_nothing_above_it():
    """`mobizo_passes.graph` is what both compilers stand on: below it lie errors, and the arithmetic of operators."""
    below = {"mobizo_passes.errors", "mobizo_passes.noise", "mobizo_passes.zo.scheme"}
    floor = [*(ROOT / "mobizo_passes/graph").rglob("*.py"), *(ROOT / f"{name.replace('.', '/')}.py" for name in below)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in floor
        for name, line in imports(path)
        if name.startswith("mobizo_passes.")
        and not name.startswith("mobizo_passes.graph")
        and not {name, name.rpartition(".")[0]} & below
    ]
    assert not wrong
