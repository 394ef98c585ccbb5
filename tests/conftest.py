"""Settings every test shares: hypothesis profiles, thread count, no network."""

import os
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.warm import freeze_imports

# Their assertions say what differs, as those of tests do.
pytest.register_assert_rewrite("tests.passes.contract", "tests.text_form")

# Set before transformers is first imported: a test that needs the network is a broken test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Graphs are checked after every pass.
os.environ.setdefault("MOBIZO_CHECK", "1")

# Compiling a model takes seconds, so examples have no deadline and slow generation is no failure.
# `ci` repeats the same examples on every run; `deep` searches, and is for a night (HYPOTHESIS_PROFILE=deep).
settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# A deep search does not shrink what it finds: that takes longer than the search, and can be done once it is known.
settings.register_profile(
    "deep", max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Tests of a file share what they compile, so a run in several processes keeps a file in one of them. The exceptions:
# tests whose ids start with `part0-`, `part1-`, … are split into those parts. (Under pytest 9.2, pytest-xdist 3.8
# ignores its own `xdist_group`.)
LONGEST = ("end_to_end/test_docs.py", "end_to_end/test_real_model.py", "coverage/test_coverage.py")


def group_of(nodeid: str) -> str:
    """Tests of the same group run in the same process."""
    file, _, test = nodeid.partition("::")
    found = re.search(r"\[(part\d+)-", test)
    return f"{file} {found[1]}" if found else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile`, with the exceptions of `group_of`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a run in several processes, what takes longest starts first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.partition("::")[0].endswith(LONGEST))


def pytest_collection_finish() -> None:
    freeze_imports()
