"""``kdrun`` without a command: train, resume, dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdrun.cli.options import config_options, overrides_of, run_options
from kdrun.errors import InputError
from kdrun.paths import expand_home


class _Group(click.Group):
    """List commands in the order of their definition, and suggest similar names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"{error.message.rstrip('.')}.{hint}", ctx) from error


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from importlib.metadata import version

        click.echo(f"kdrun {version('kdlosses')}")
        ctx.exit()


@click.group("kdrun", cls=_Group, invoke_without_command=True)
@run_options
@config_options("YAML file with sections and keys.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.option("--resume", is_flag=True, help="Continue the run in --output.")
@click.option(
    "--dry-run", is_flag=True, help="Check the input and report steps and memory without training."
)
@click.option(
    "--device",
    metavar="NAME",
    help="With --dry-run: the target device, such as cpu, cuda, h100 or 24GiB.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="With --dry-run: the number of processes.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(
    ctx: click.Context,
    /,
    config: Path | None,
    settings: tuple[str, ...],
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    device: str | None,
    processes: int | None,
    **flags: str | tuple[str, ...] | None,
) -> None:
    """Distil a teacher into a student with any registered loss.

    Without a command, kdrun trains: "kdrun --loss forward_kl_chunked --kd-ratio 0.5" distils the
    built-in pair; use --teacher, --student and --data for your own models and data. Exit codes:
    0 done, 1 failure in training, 2 wrong input; 128 plus the number of the signal (130 for Ctrl-C,
    143 for SIGTERM) interrupted after saving.
    """
    given = [(key.replace("__", "."), text) for key, text in flags.items() if text]
    if ctx.invoked_subcommand is not None:
        if given or config or settings or overwrite or resume or dry_run or device or processes:
            raise click.UsageError(
                f"options before the command {ctx.invoked_subcommand!r} have no effect; "
                f"see kdrun {ctx.invoked_subcommand} --help"
            )
        return
    from kdrun.config.load import load_config
    from kdrun.run.distill import distill

    overrides = overrides_of(settings, given)
    if resume and overwrite:
        raise InputError("--resume and --overwrite cannot be combined")
    folder = dict(overrides).get("output.dir")
    if resume and config is None and folder is not None:
        # A resumed run keeps its configuration unless flags change it.
        config = _config_in(expand_home(str(folder)))
    run_config = load_config(config, overrides)
    if resume and run_config.output.dir is None:
        raise InputError("--resume needs --output, the folder of the run to continue")
    for option, value in (("--device", device), ("--processes", processes)):
        if value is not None and not dry_run:
            raise click.UsageError(f"{option} requires --dry-run")
    if dry_run:
        _show_dry_run(run_config, device, processes)
        return
    distill(run_config, resume=resume, overwrite=overwrite)


def _show_dry_run(config: Any, device: str | None, processes: int | None) -> None:
    from rich.console import Console

    from kdrun.dry_run.report import dry_run, show

    show(dry_run(config, device, processes), Console(highlight=False, soft_wrap=True))


def _config_in(folder: Path) -> Path:
    """The configuration saved by a run, so that ``--resume --output DIR`` is enough."""
    from kdrun.run.folder import CONFIG

    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume: {folder} contains no run to continue")
    return folder / CONFIG
