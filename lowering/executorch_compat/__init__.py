"""Everything that stands on the insides of ExecuTorch and torch: private names, patched classes, undocumented keys.

The rest of `lowering` calls these modules and touches no private name of ExecuTorch. For each there is a canary in
`tests/lowering/test_executorch_compat.py`, whose message says what to do when a new release changes it.
"""
