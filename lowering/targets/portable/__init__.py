"""ExecuTorch's own kernels, without a delegate."""
