"""Settings every test shares: hypothesis profiles, thread count, no network."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Set before transformers is first imported: a test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Compiling a model takes seconds, so examples have no deadline and slow generation is no failure.
# `ci` repeats the same examples on every run; `deep` searches, and is for a night (HYPOTHESIS_PROFILE=deep).
settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`: a file stays in one process, unless its tests say that they form other groups.

    Tests of a file share what they compile. The group with the real model takes longest, so it starts first.
    """
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.location[0]))
    items.sort(key=lambda item: not _uses_the_real_model_s_program(item))


def _uses_the_real_model_s_program(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("xdist_group")
    return marker is not None and marker.args == ("demo",)
