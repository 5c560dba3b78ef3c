"""``kdrun served``."""

from __future__ import annotations

import click

from kdrun.paths import expand_home


@click.group()
def served() -> None:
    """Prepare an inference server for distillation."""


@served.command("connector")
@click.option("--output", required=True, metavar="DIR", help="Folder for the connector's module.")
@click.option(
    "--model", metavar="MODEL", help="Folder or hub id, for the line that starts the server."
)
@click.option(
    "--writer",
    is_flag=True,
    help="MODEL is the student: the server writes its answers with weights that it takes in.",
)
@click.option(
    "--states",
    metavar="DIR",
    help="Folder for hidden states that server and trainer see; in memory by default.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code of MODEL.")
def connector(
    output: str, model: str | None, writer: bool, states: str | None, trust_remote_code: bool
) -> None:
    """Write the module by which vLLM hands hidden states to kdrun, and takes weights in.

    With --model, the line that starts the server is printed on standard output.
    """
    from kdrun.served.connector import start_line, write_connector

    path = write_connector(expand_home(output))
    click.echo(f"connector: {path}; it belongs on the server's PYTHONPATH", err=True)
    if model is not None:
        click.echo(start_line(model, path.parent, states, writer, trust_remote_code))
