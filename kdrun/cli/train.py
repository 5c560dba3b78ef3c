"""``kdrun`` itself: train, resume, dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdrun.cli.options import overrides_of, run_options
from kdrun.errors import InputError
from kdrun.paths import expand_home


class _Group(click.Group):
    """Shows commands in the order of their definition and suggests close names."""

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
@click.option("--config", type=click.Path(path_type=Path), help="YAML file with sections and keys.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set section.key; repeatable."
)
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.option("--resume", is_flag=True, help="Continue the run in --output.")
@click.option("--dry-run", is_flag=True, help="Check the input; show steps and memory; train not.")
@click.option("--device", metavar="NAME", help="Of --dry-run: cpu, cuda, h100, 24GiB, ...")
@click.option(
    "--processes", type=click.IntRange(1), metavar="N", help="Of --dry-run: as many as torchrun's."
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
    **flags: str | None,
) -> None:
    """Distil a teacher into a student with any registered loss.

    Without a command it trains: "kdrun --loss forward_kl_chunked --kd-ratio 0.5" distils the
    built-in pair, and --teacher, --student and --data name another. Exit codes: 0 done, 1 failure
    in training, 2 wrong input, 130 interrupted after saving.
    """
    given = [(key.replace("__", "."), text) for key, text in flags.items() if text is not None]
    if ctx.invoked_subcommand is not None:
        if given or config or settings or overwrite or resume or dry_run or device or processes:
            raise click.UsageError(
                f"options of a run stand before the command {ctx.invoked_subcommand!r}, where they "
                "have no effect; see its own --help"
            )
        return
    from kdrun.config.load import load_config
    from kdrun.run.distill import distill

    overrides = overrides_of(settings, given)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    folder = dict(overrides).get("output.dir")
    if resume and config is None and folder is not None:
        # A run goes on as it was; flags change it.
        config = _config_in(expand_home(str(folder)))
    run_config = load_config(config, overrides)
    if resume and run_config.output.dir is None:
        raise InputError("--resume needs --output, the folder of the run to continue")
    for option, value in (("--device", device), ("--processes", processes)):
        if value is not None and not dry_run:
            raise click.UsageError(f"{option} goes with --dry-run")
    if dry_run:
        _show_dry_run(run_config, device, processes)
        return
    distill(run_config, resume=resume, overwrite=overwrite)


def _show_dry_run(config: Any, device: str | None, processes: int | None) -> None:
    from rich.console import Console

    from kdrun.dry_run.report import dry_run, show

    show(dry_run(config, device, processes), Console(highlight=False, soft_wrap=True))


def _config_in(folder: Path) -> Path:
    """The configuration that a run wrote, so that ``--resume --output DIR`` is enough."""
    from kdrun.run.folder import CONFIG

    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume: {folder} holds no run to continue")
    return folder / CONFIG
