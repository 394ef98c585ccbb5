"""The reference has every public name, and no name that is not there."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PUBLIC = {
    "mobizo_passes": ("mobizo_passes", "mobizo_passes.testing", "mobizo_passes.testing.strategies"),
    "lowering": ("lowering", "lowering.testing"),
    "runtime_driver": ("runtime_driver", "runtime_driver.fleet"),
}


@pytest.mark.parametrize("page", PUBLIC)
def test_the_reference_covers_every_public_name(page: str):
    listed = re.findall(r"^::: (\S+)$", (REFERENCE / f"{page}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    # A function of the name of its module is written with both.
    listed = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in listed]
    public = {f"{name}.{each}" for name in PUBLIC[page] for each in importlib.import_module(name).__all__}
    assert public <= set(listed)


def test_every_page_of_the_reference_is_checked():
    assert {path.stem for path in REFERENCE.glob("*.md")} == set(PUBLIC)
