"""Prompts: files and sets of them by name, and the order that a run draws them in."""
