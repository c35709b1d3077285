"""The model families: one file for each of diffusers', and the only place that knows its pipeline class."""
