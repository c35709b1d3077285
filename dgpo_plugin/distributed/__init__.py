"""Which device this process computes on, in which precision, and what processes tell each other."""
