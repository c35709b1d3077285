"""Runs that are killed, starved of disk and robbed of their folder, and go on to the bits of one left alone."""
