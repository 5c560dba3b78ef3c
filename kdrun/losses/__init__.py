"""Losses on the command line: build, list, describe, plot, check and create them."""
