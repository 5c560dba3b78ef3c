"""``kdrun weights``."""

from __future__ import annotations

import sys

import click


@click.group()
def weights() -> None:
    """List, show, check and create token weights, which say how much each token counts."""


@weights.command("list")
def list_weights() -> None:
    """List the registered token weights."""
    from kdrun.losses.weights import print_list

    print_list()


@weights.command("show")
@click.argument("name")
def show_weight(name: str) -> None:
    """Show the formula, parameters and traits of a token weight."""
    from kdrun.losses.weights import print_weight

    print_weight(name)


@weights.command("check")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def check_weights(name: str, as_json: bool) -> None:
    """Run the conformance checks of a token weight; the exit code is 1 if one fails."""
    from kdrun.losses.weights import print_checks

    if not print_checks(name, as_json):
        sys.exit(1)


@weights.command("new")
@click.argument("name")
@click.option("--output", metavar="DIR", help="Folder of the package; by default ./kdlosses-NAME.")
def new_weights(name: str, output: str | None) -> None:
    """Create a complete package with a token weight, its tests, a CI file and a README."""
    from kdrun.losses.new_weight import new_weight

    folder = new_weight(name, output)
    click.echo(f"{folder}: cd there, then pip install -e '.[dev]' && pytest")
