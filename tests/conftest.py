"""Settings every test shares: hypothesis profiles, thread count, no network."""

import os

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
