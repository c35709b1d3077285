"""Embedded worlds: a tiny pipeline with its prompts and its verifier, so that everything runs with nothing else."""
