"""Passes over constants, weights and dtypes, and the quantization of what a delegate computes."""
