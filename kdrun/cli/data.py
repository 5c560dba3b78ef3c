"""``kdrun data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdrun.cli.options import config_options, overrides_of
from kdrun.errors import InputError


@click.group()
def data() -> None:
    """Look at rows."""


@data.command("show")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--rows", default=3, type=click.IntRange(0), metavar="N", help="Rows to show; 3.")
@click.option(
    "--tokenizer", metavar="MODEL", help="Whose tokenizer encodes the rows; 'builtin' by default."
)
@click.option("--student", metavar="MODEL", help="The same, as in training.")
@click.option("--max-length", metavar="L", help="Maximum number of tokens in a row.")
@config_options("Configuration (YAML) of a run, whose rows are shown without SOURCE.")
def show(
    sources: tuple[str, ...],
    rows: int,
    tokenizer: str | None,
    student: str | None,
    max_length: str | None,
    config: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Show what a run would learn from: rows with their supervised tokens, counts and lengths.

    SOURCE is a file, glob, folder or hub id, as for --data of kdrun. No model is loaded.
    """
    from rich.console import Console

    from kdrun.config.base import BUILT_IN
    from kdrun.config.load import load_config
    from kdrun.data.show import show_rows
    from kdrun.models.generation import find_model
    from kdrun.models.tokenizers import load_tokenizer
    from kdrun.procedures.registry import takes_prompts
    from kdrun.quiet import quiet_libraries

    if tokenizer is not None and student is not None:
        raise InputError("--tokenizer and --student name the same thing; pass one of them")
    given: list[tuple[str, Any]] = [("data.train", sources), ("data.max_length", max_length)]
    found = load_config(config, overrides_of(settings, given))
    if found.data.train == BUILT_IN and not found.data.sources:
        raise InputError("pass the rows to show, or a configuration that names them")
    named = tokenizer or student or found.model.student
    with quiet_libraries():
        source = find_model(named)
        loaded = load_tokenizer(source, trust_remote_code=found.model.trust_remote_code)
        console = Console(highlight=False, soft_wrap=True)
        show_rows(found.data, loaded, rows, console, takes_prompts(found))
