"""The adapter file: out, in, at which scale, and its card."""
