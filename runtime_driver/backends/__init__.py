"""What the driver needs of a backend beyond ExecuTorch's runtime; the lowering compiles with the same libraries."""
