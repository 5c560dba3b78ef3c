"""``kdrun cache-teacher``."""

from __future__ import annotations

from pathlib import Path

import click

from kdrun.cli.options import config_options, overrides_of
from kdrun.models.address import is_address
from kdrun.paths import expand_home


@click.command("cache-teacher")
@click.option(
    "--teacher",
    metavar="MODEL",
    help="Teacher, or a server's address; by default the built-in.",
)
@click.option(
    "--student", metavar="MODEL", help="Student whose tokenizer is used; by default TEACHER."
)
@click.option("--data", metavar="FILE", help="Training rows; by default the built-in text.")
@click.option("--eval-data", metavar="FILE", help="Held-out rows.")
@click.option(
    "--kind",
    default="hidden",
    show_default=True,
    type=click.Choice(("hidden", "top-k", "sampled")),
    help="What to store; only hidden is exact.",
)
@click.option(
    "--k",
    type=click.IntRange(1),
    metavar="K",
    help="Most likely tokens to store per position with top-k; 50.",
)
@click.option(
    "--draws",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens to draw per position with sampled; 50.",
)
@click.option(
    "--temperature", metavar="T", help="Temperature of the stored top-k or sampled probabilities."
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16")),
    help="Data type of the teacher and the stored states.",
)
@click.option("--max-length", metavar="L", help="Maximum number of tokens in a row.")
@click.option("--batch-size", metavar="B", help="Rows per batch.")
@config_options("Configuration (YAML) of the run that will use the cache.")
@click.option("--output", required=True, metavar="DIR", help="Folder of the cache.")
def cache_teacher(
    kind: str,
    k: int | None,
    draws: int | None,
    config: Path | None,
    settings: tuple[str, ...],
    output: str,
    teacher: str | None,
    student: str | None,
    **flags: str | None,
) -> None:
    """Store a teacher's outputs for all rows, so that training does not run the teacher."""
    for option, value, right in (("--k", k, "top-k"), ("--draws", draws, "sampled")):
        if value is not None and kind != right:
            raise click.UsageError(f"{option} requires --kind {right}")
    if kind == "hidden" and flags["temperature"] is not None:
        raise click.UsageError(
            "--temperature has no effect on --kind hidden, which works for every temperature"
        )
    from kdrun.cache.command import cache_teacher as run
    from kdrun.config.load import load_config
    from kdrun.run.precision import settle_precision

    keys = {
        "data": "data.train",
        "eval_data": "data.eval",
        "temperature": "loss.temperature",
        "dtype": "model.teacher_dtype",
        "max_length": "data.max_length",
        "batch_size": "training.batch_size",
    }
    given = [
        ("model.teacher", teacher),
        ("model.student", student or (None if is_address(teacher) else teacher)),
        *((keys[name], value) for name, value in flags.items()),
    ]
    run_config = settle_precision(load_config(config, overrides_of(settings, given)))
    run(
        run_config.model,
        run_config.served,
        run_config.data,
        run_config.loss.temperature,
        run_config.training.seed,
        run_config.training.batch_size,
        expand_home(output),
        "hidden" if kind == "hidden" else "top_k" if kind == "top-k" else "sampled",
        (draws if kind == "sampled" else k) or 50,
    )
