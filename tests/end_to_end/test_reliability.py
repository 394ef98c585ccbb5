"""docs/reliability.md: every test that a promise rests on is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_promise_has_its_test():
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE
    )
    promises = [row for row in rows if row[0] != "kind"]
    assert len(promises) > 20
    for _, promise, tests in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, f"no test behind: {promise}"
        for file, name in named:
            assert (ROOT / file).is_file(), f"{file}: {promise}"
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
