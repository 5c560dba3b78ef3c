"""The built-in token weights, one file each."""
