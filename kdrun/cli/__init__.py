"""The command line: one module per group of commands, each with its options and one call."""

from kdrun.cli.main import cli, main

__all__ = ["cli", "main"]
