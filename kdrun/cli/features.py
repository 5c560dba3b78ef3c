"""``kdrun features``."""

from __future__ import annotations

import sys

import click


@click.group()
def features() -> None:
    """List, show, check and create losses on hidden states."""


@features.command("list")
@click.option(
    "--details", is_flag=True, help="Import each loss and show its parameters and reference."
)
def list_features(details: bool) -> None:
    """List the registered losses on hidden states."""
    from kdrun.losses.show_features import print_features

    print_features(details)


@features.command("show")
@click.argument("name")
def show_features(name: str) -> None:
    """Show the formula, parameters and traits of a loss on hidden states."""
    from kdrun.losses.show_features import print_feature

    print_feature(name)


@features.command("check")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Check every registered loss.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def check_features(name: str | None, everything: bool, as_json: bool) -> None:
    """Run the conformance checks of a loss on hidden states; the exit code is 1 if one fails.

    NAME is a registered loss or a class of a file, such as my_features.py:Smooth.
    """
    if everything == (name is not None):
        raise click.UsageError("give the name of a loss, or --all")
    from kdrun.losses.show_features import (
        check_all_features,
        print_features_json,
    )
    from kdrun.losses.show_features import (
        check_features as check_one,
    )

    if as_json:
        passed = print_features_json(name)
    else:
        passed = check_all_features() if name is None else check_one(name)
    if not passed:
        sys.exit(1)


@features.command("new")
@click.argument("name")
@click.option("--output", metavar="DIR", help="Folder of the package; by default ./kdlosses-NAME.")
def new_features(name: str, output: str | None) -> None:
    """Create a complete package with a loss on hidden states, its tests, a CI file and a README."""
    from kdrun.losses.new_feature import new_feature

    folder = new_feature(name, output)
    click.echo(f"{folder}: cd there, then pip install -e '.[dev]' && pytest")
