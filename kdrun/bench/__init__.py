"""``kdrun bench``: time and memory of losses compared with their lower bound."""
