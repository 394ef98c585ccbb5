"""Reverse mode: the gradient of a loss as further nodes of the same graph."""
