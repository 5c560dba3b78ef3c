"""Teachers on an inference server: their states or log-probabilities, and text that they write."""
