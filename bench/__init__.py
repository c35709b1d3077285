"""The benchmark harness, installed as ``dgpo_bench``: one budget, several algorithms and seeds, one report."""
