"""Rendered words read back, and how near they are to those asked for."""
