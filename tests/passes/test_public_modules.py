"""Modules that users import by name, beside what `import mobizo_passes` offers."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("mobizo_passes.noise", ("noise", "site_ids")),
        ("mobizo_passes.reference", ("step", "apply", "projected_gradients")),
        ("mobizo_passes.errors", ("MobizoError", "InputError")),
    ],
)
def test_they_keep_their_names(module: str, names: tuple[str, ...]):
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in names)
