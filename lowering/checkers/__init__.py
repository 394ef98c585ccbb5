"""Checkers of serialised delegates: what a runtime is known to get wrong must not be in the file."""
