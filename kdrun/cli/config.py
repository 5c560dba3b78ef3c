"""``kdrun config``."""

from __future__ import annotations

import click


@click.command("config")
def config_command() -> None:
    """Print the full default configuration as YAML, with the meaning of each key."""
    from kdrun.config.show import default_yaml

    click.echo(default_yaml(), nl=False)
