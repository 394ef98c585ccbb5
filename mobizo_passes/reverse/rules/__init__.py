"""The rows of the table, by what the operators do."""

from mobizo_passes.reverse.rules import convolutions, elementwise, layouts, losses, products, reductions, selections

__all__ = ["convolutions", "elementwise", "layouts", "losses", "products", "reductions", "selections"]
