"""Legalization passes: each rewrites one form that a delegate refuses into one that it takes.

They run on functional ATen graphs, before ExecuTorch sees them; each target's `pipeline` lists its passes in order.
"""
