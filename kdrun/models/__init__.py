"""Finding, loading and making models and tokenizers."""
