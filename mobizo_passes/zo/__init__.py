"""Zeroth-order optimization: estimators, noise, the sequential reference, how losses of batches combine."""
