"""``kdrun compare-losses`` and ``kdrun report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdrun.cli.options import config_options, overrides_of


@click.command("compare-losses")
@click.option(
    "--loss", "losses", multiple=True, metavar="SPEC", help="Loss to compare; repeatable."
)
@click.option(
    "--kd-ratio",
    "kd_ratios",
    multiple=True,
    type=float,
    metavar="R",
    help="Weight of the loss; repeatable.",
)
@click.option(
    "--lr", "lrs", multiple=True, type=float, metavar="LR", help="Learning rate; repeatable."
)
@click.option("--teacher", "teachers", multiple=True, metavar="MODEL", help="Teacher; repeatable.")
@click.option(
    "--student", "students", multiple=True, metavar="MODEL", help="Initial student; repeatable."
)
@click.option(
    "--procedure",
    "procedures",
    multiple=True,
    metavar="SPEC",
    help="The source of the training text, for every loss; 'none' is the data. Repeatable.",
)
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    metavar="N",
    help="Trials of each arm; a verdict needs at least 2.",
)
@click.option(
    "--tuning-seeds",
    default=2,
    show_default=True,
    metavar="N",
    help="Tuning trials of each combination if --lr or --kd-ratio is repeated.",
)
@click.option(
    "--yardstick", default="ce", show_default=True, metavar="NAME", help="Primary measure."
)
@click.option(
    "--difference",
    type=float,
    metavar="D",
    help="Smallest difference of interest on the primary measure.",
)
@click.option("--data", metavar="FILE", help="Training rows: a file or a hub id.")
@click.option("--eval-data", metavar="FILE", help="Held-out rows.")
@click.option("--temperature", metavar="T", help="Softens both distributions of every loss.")
@click.option("--max-steps", metavar="N", help="Optimiser steps of each trial.")
@click.option("--batch-size", metavar="B", help="Rows per micro-batch.")
@click.option("--max-length", metavar="L", help="Maximum number of tokens in a row.")
@config_options("YAML file with the settings that all trials share.")
@click.option("--output", metavar="DIR", help="Folder; by default runs/<time>-comparison.")
@click.option("--keep-students", is_flag=True, help="Keep the weights of every trial.")
@click.option(
    "--teacher-cache/--no-teacher-cache",
    default=True,
    show_default=True,
    help="Run each teacher once for all trials, or again in every trial.",
)
@click.option(
    "--jobs",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of processes.",
)
@click.option(
    "--launcher",
    default="local",
    show_default=True,
    type=click.Choice(("local", "ray")),
    help="ray runs the trials as tasks of a Ray cluster.",
)
@click.option(
    "--trial-cpus",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="CPU cores of each trial on Ray; 1.",
)
@click.option(
    "--trial-gpus",
    type=click.FloatRange(0),
    metavar="N",
    help="GPUs of each trial on Ray, fractions allowed; 1 if the cluster has GPUs, else 0.",
)
@click.option("--ray-address", metavar="HOST:PORT", help="Address of a running Ray cluster.")
@click.option("--dry-run", is_flag=True, help="Show the trials and their approximate duration.")
def compare_losses(
    data: str | None,
    eval_data: str | None,
    temperature: str | None,
    max_steps: str | None,
    batch_size: str | None,
    max_length: str | None,
    settings: tuple[str, ...],
    launcher: str,
    trial_cpus: float | None,
    trial_gpus: float | None,
    ray_address: str | None,
    **given: Any,
) -> None:
    """Compare losses in paired trials over several seeds; report a verdict for each loss.

    All trials share the initial student, the number of steps and the evaluation; trials with the
    same seed also share the order of rows. A baseline trained with cross-entropy alone is always
    included. The same command with the same --output resumes and runs only what is missing.
    """
    from kdrun.compare.cluster import Cluster
    from kdrun.compare.command import Options
    from kdrun.compare.command import compare_losses as compare
    from kdrun.quiet import make_console

    flags = {
        "data.train": data,
        "data.eval": eval_data,
        "loss.temperature": temperature,
        "training.max_steps": max_steps,
        "training.batch_size": batch_size,
        "data.max_length": max_length,
    }
    cluster = None
    if launcher == "ray":
        if given["jobs"] > 1:
            raise click.UsageError(
                "--jobs requires --launcher local; Ray runs as many trials as its resources allow"
            )
        cluster = Cluster(trial_cpus or 1.0, trial_gpus, ray_address)
    else:
        for option, value in (
            ("--trial-cpus", trial_cpus),
            ("--trial-gpus", trial_gpus),
            ("--ray-address", ray_address),
        ):
            if value is not None:
                raise click.UsageError(f"{option} requires --launcher ray")
    overrides = tuple(overrides_of(settings, list(flags.items())))
    compare(Options(overrides=overrides, cluster=cluster, **given), make_console())


@click.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Rewrite the report of a comparison, finished or not; DIR is its --output."""
    from kdrun.compare.command import report_again
    from kdrun.quiet import make_console

    report_again(folder, make_console())
