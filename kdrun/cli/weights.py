"""``kdrun weights``."""

from __future__ import annotations

import sys

import click


@click.group()
def weights() -> None:
    """List, show and check token weights, which say how much each token counts."""


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
