"""``kdrun bench``: time and memory of losses against the matrix products that none can avoid."""
