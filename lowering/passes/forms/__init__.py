"""Passes over operators, shapes and views: the same values in another form."""
