"""``kdrun procedures``."""

from __future__ import annotations

import sys

import click


@click.group()
def procedures() -> None:
    """List, show and check procedures, which select the training text."""


@procedures.command("list")
def list_procedures() -> None:
    """List the registered procedures."""
    from kdrun.procedures.show import print_list

    print_list()


@procedures.command("show")
@click.argument("name")
def show_procedure(name: str) -> None:
    """Show the description, parameters and defaults of a procedure."""
    from kdrun.procedures.show import print_procedure

    print_procedure(name)


@procedures.command("check")
@click.argument("name")
def check_procedures(name: str) -> None:
    """Run the conformance checks of a procedure; the exit code is 1 if one fails."""
    from kdrun.procedures.show import print_checks

    if not print_checks(name):
        sys.exit(1)
