"""Forward mode: tangents as further nodes of the same graph, beside the values that they belong to."""
