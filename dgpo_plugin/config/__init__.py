"""The configuration: what its fields are, how files become one, what is said of a mistake. Free of torch."""
