"""The report of a comparison: ``results.json`` to curves, intervals, a verdict and one page."""
