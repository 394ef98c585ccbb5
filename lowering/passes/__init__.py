"""Legalisation passes: each rewrites one form that a delegate refuses into one that it takes.

They run on functional ATen graphs, before ExecuTorch sees them; `lowering.pipelines` lists them in order.
"""
