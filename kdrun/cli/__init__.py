"""The command line: one module for each group of commands, options and one call each."""

from kdrun.cli.main import cli, main

__all__ = ["cli", "main"]
