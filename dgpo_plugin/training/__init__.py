"""The loop, a run on disk, and what it will take."""
