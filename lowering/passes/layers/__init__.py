"""Passes over what layers are made of: attention, norms, activations, masks and products."""
