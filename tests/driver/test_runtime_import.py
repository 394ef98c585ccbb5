"""The driver imports ExecuTorch's runtime without its compiler; both orders of importing them work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SESSION = "import runtime_driver; from runtime_driver.backends.runtime import runtime, bindings; runtime(); bindings()"
# What takes most of the time when the compiler is imported.
COMPILER = {"executorch.exir", "torch._dynamo", "torch._inductor", "torchao"}


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_runtime_comes_without_the_compiler():
    """If this fails with a new ExecuTorch: its runtime needs more of `executorch.exir` than the class of a warning.

    See `runtime_driver.backends.runtime`; importing `executorch.runtime` plainly is right too, and slow.
    """
    loaded = modules_after(SESSION)
    assert "executorch.extension.pybindings._C" in loaded
    assert not COMPILER & loaded


@pytest.mark.parametrize(
    "code",
    [
        f"{SESSION}\nfrom executorch.exir import to_edge_transform_and_lower\nimport executorch.exir.passes",
        f"import executorch.exir\n{SESSION}\nassert executorch.exir.to_edge_transform_and_lower",
    ],
    ids=["runtime-first", "compiler-first"],
)
def test_the_compiler_is_whole_before_or_after(code: str):
    assert {"executorch.exir.program", "executorch.runtime"} <= modules_after(code)
