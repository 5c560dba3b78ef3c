"""Evaluation of a model on held-out rows, by its distributions and its answers."""
