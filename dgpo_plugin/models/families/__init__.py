"""One file a diffusers family; the only place that knows a pipeline class."""
