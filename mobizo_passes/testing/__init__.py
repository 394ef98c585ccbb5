"""A kit for property tests of models that this compiler transforms, and of what is added to it.

    from mobizo_passes.testing import check_agreement, strategies

`check_agreement` holds steps of a compiled model against the sequential reference, and names the first node whose value
differs; `check_rule` does it for a batching rule. `strategies` draws batches, adapters, options and whole models; it
needs hypothesis, which the rest does not. What was lowered is checked by `lowering.testing`.
"""

from mobizo_passes.batching.register import check_rule
from mobizo_passes.testing.agreement import check_agreement, well_conditioned
from mobizo_passes.testing.locate import Difference, first_difference

__all__ = ["Difference", "check_agreement", "check_rule", "first_difference", "well_conditioned"]
