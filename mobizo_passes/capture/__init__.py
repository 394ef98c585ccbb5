"""From a model and its example inputs to a graph: export, and everything that must be fixed before it."""
