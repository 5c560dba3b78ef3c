"""``kdrun config``."""

from __future__ import annotations

import click


@click.command("config")
def config_command() -> None:
    """Print the full default configuration as YAML, each key with its meaning."""
    from kdrun.config.show import default_yaml

    click.echo(default_yaml(), nl=False)
