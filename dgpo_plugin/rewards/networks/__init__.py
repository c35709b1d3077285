"""Rewards that are networks, and what they share."""
