"""Shapes on a dark ground: renderer, captions, verifier, and the shipped pipeline with how it was made."""
