"""``dgpo-bench gpu``: what full-size models take on a GPU, measured with random weights."""
