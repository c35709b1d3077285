"""Pure step functions on tensors, and the loops that call them with a velocity function."""
