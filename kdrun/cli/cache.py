"""``kdrun cache-teacher``."""

from __future__ import annotations

from pathlib import Path

import click

from kdrun.cli.options import overrides_of
from kdrun.paths import expand_home


@click.command("cache-teacher")
@click.option("--teacher", metavar="MODEL", help="By default the built-in teacher.")
@click.option("--student", metavar="MODEL", help="Whose tokenizer encodes; by default TEACHER's.")
@click.option("--data", metavar="FILE", help="Training rows; by default the built-in text.")
@click.option("--eval-data", metavar="FILE", help="Held-out rows.")
@click.option(
    "--kind",
    default="hidden",
    show_default=True,
    type=click.Choice(("hidden", "top-k", "sampled")),
    help="hidden is exact.",
)
@click.option("--k", type=click.IntRange(1), metavar="K", help="Tokens kept; 50.")
@click.option("--draws", type=click.IntRange(1), metavar="N", help="Tokens drawn; 50.")
@click.option("--temperature", metavar="T", help="Softens what top-k and sampled keep.")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16")),
    help="Of the teacher and the stored states.",
)
@click.option("--max-length", metavar="L", help="Tokens a row.")
@click.option("--batch-size", metavar="B", help="Rows that run through the teacher at once.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file of the run to cache for."
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set section.key; repeatable."
)
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
    """Keep what a teacher says about rows, so that training does without the teacher."""
    for option, value, right in (("--k", k, "top-k"), ("--draws", draws, "sampled")):
        if value is not None and kind != right:
            raise click.UsageError(f"{option} goes with --kind {right}")
    if kind == "hidden" and flags["temperature"] is not None:
        raise click.UsageError("--temperature: hidden states serve every temperature")
    from kdrun.cache.command import cache_teacher as run
    from kdrun.config.load import load_config

    keys = {
        "data": "data.train",
        "eval_data": "data.eval",
        "temperature": "loss.temperature",
        "dtype": "model.dtype",
        "max_length": "data.max_length",
        "batch_size": "training.batch_size",
    }
    given = [
        ("model.teacher", teacher),
        ("model.student", student or teacher),
        *((keys[name], value) for name, value in flags.items()),
    ]
    run_config = load_config(config, overrides_of(settings, given))
    run(
        run_config.model,
        run_config.data,
        run_config.loss.temperature,
        run_config.training.seed,
        run_config.training.batch_size,
        expand_home(output),
        "hidden" if kind == "hidden" else "top_k" if kind == "top-k" else "sampled",
        (draws if kind == "sampled" else k) or 50,
    )
