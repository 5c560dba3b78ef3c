"""``kdrun bench``."""

from __future__ import annotations

import sys
from typing import Any

import click


@click.command("bench")
@click.option(
    "--loss", "losses", multiple=True, metavar="SPEC", help="By default every registered loss."
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(("torchtune", "liger", "trl", "none")),
    help="Repeatable.",
)
@click.option("--tokens", multiple=True, type=int, default=(2048,), help="Repeatable.")
@click.option("--vocab", "vocabs", multiple=True, type=int, default=(49152,), help="Repeatable.")
@click.option("--student-width", default=576, show_default=True)
@click.option("--teacher-width", default=960, show_default=True)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(("float32", "bfloat16", "float16")),
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(("cpu", "cuda")))
@click.option("--threads", type=int, help="Of torch; its own choice by default.")
@click.option("--rounds", default=5, show_default=True, help="Timed steps of each variant.")
@click.option("--kd-ratio", default=0.5, show_default=True, help="Weight of the loss.")
@click.option("--chunk-size", type=int, help="Rows a chunk; as in training by default.")
@click.option(
    "--plain/--no-plain",
    default=True,
    show_default=True,
    help="Measure the plain evaluation too, which takes most of the time.",
)
@click.option("--output", metavar="DIR", help="Folder; by default runs/<time>-bench.")
def bench(
    losses: tuple[str, ...],
    peers: tuple[str, ...],
    tokens: tuple[int, ...],
    vocabs: tuple[int, ...],
    output: str | None,
    **settings: Any,
) -> None:
    """Measure time and memory of losses against the matrix products that none can avoid."""
    from kdrun.bench.cases import Settings
    from kdrun.bench.command import bench as run
    from kdrun.bench.plan import make_plan
    from kdrun.run.folder import choose_folder

    folder = choose_folder(output, "bench")
    plan = make_plan(Settings(**settings), tokens, vocabs, losses, peers, folder)
    if not run(plan):
        sys.exit(1)
