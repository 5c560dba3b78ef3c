"""Locating, loading and creating models and tokenizers."""
