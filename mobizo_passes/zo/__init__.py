"""Zeroth-order optimization: the estimators, and how the losses of batches combine."""
