"""The built-in losses on hidden states, one in each file."""
