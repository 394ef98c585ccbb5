"""Zeroth-order gradient estimators, a file each: how groups of perturbed losses become projected gradients."""

from mobizo_passes.zo.estimators.base import (
    Estimator,
    check_estimator,
    estimator_kinds,
    register_estimator,
    unregister_estimator,
)
from mobizo_passes.zo.estimators.exact import Exact
from mobizo_passes.zo.estimators.forward_gradient import ForwardGradient
from mobizo_passes.zo.estimators.one_sided import OneSided
from mobizo_passes.zo.estimators.two_sided import TwoSided

# The list: names on the command line and kinds in manifests come from here.
for _estimator in (TwoSided, OneSided, ForwardGradient, Exact):
    register_estimator(_estimator)

__all__ = [
    "Estimator",
    "Exact",
    "ForwardGradient",
    "OneSided",
    "TwoSided",
    "check_estimator",
    "estimator_kinds",
    "register_estimator",
    "unregister_estimator",
]
