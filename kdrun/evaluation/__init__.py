"""Measures of a model on held-out rows: by its distributions and by its answers."""
