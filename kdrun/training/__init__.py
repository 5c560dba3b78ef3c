"""The trainer, and the parts that work inside it."""
