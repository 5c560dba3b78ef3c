"""``kdrun losses``."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def losses() -> None:
    """List, show, check and create losses."""


@losses.command("list")
@click.option(
    "--details", is_flag=True, help="Import each loss and show its parameters and reference."
)
def list_losses(details: bool) -> None:
    """List the registered losses; each name also works with the suffix _chunked."""
    from kdrun.losses.show import print_list

    print_list(details)


@losses.command("show")
@click.argument("name")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Write the plot: .png or .svg."
)
def show_loss(name: str, plot: Path | None) -> None:
    """Show the formula, parameters, traits and plot of a loss."""
    from kdrun.losses.show import print_loss

    print_loss(name, plot)


@losses.command("check")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Check every registered loss.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def check_losses(name: str | None, everything: bool, as_json: bool) -> None:
    """Run the conformance checks of a loss; the exit code is 1 if one fails.

    NAME is a registered loss or a class of a file, such as my_loss.py:Triangular.
    """
    if everything == (name is not None):
        raise click.UsageError("give the name of a loss, or --all")
    from kdrun.losses.check import check_all, check_one, print_json

    if as_json:
        sys.exit(not print_json(name))
    passed = check_all() if name is None else check_one(name)
    if not passed:
        sys.exit(1)


@losses.command("new")
@click.argument("name")
@click.option("--output", metavar="DIR", help="Folder of the package; by default ./kdlosses-NAME.")
@click.option(
    "--from", "source", metavar="FILE.py:CLASS", help="Package this loss instead of an example."
)
def new_loss(name: str, output: str | None, source: str | None) -> None:
    """Create a complete package with a loss, its tests, a CI file and a README."""
    from kdrun.losses.new import new_loss as write

    folder = write(name, output, source)
    click.echo(f"{folder}: cd there, then pip install -e '.[dev]' && pytest")
