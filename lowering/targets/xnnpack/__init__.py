"""XNNPACK: CPUs."""
