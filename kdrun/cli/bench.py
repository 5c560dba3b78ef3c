"""``kdrun bench``."""

from __future__ import annotations

import sys
from typing import Any

import click


@click.command("bench")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="SPEC",
    help="Loss; repeatable. By default every registered loss.",
)
@click.option(
    "--peer",
    "peers",
    multiple=True,
    type=click.Choice(("torchtune", "liger", "trl", "none")),
    help="Other library to measure; repeatable. By default those that are installed.",
)
@click.option(
    "--tokens", multiple=True, type=int, default=(2048,), help="Number of tokens; repeatable."
)
@click.option(
    "--vocab",
    "vocabs",
    multiple=True,
    type=int,
    default=(49152,),
    help="Vocabulary size; repeatable.",
)
@click.option("--student-width", default=576, show_default=True)
@click.option("--teacher-width", default=960, show_default=True)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(("float32", "bfloat16", "float16")),
)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(("cpu", "cuda")))
@click.option("--threads", type=int, help="Threads of torch; by default torch decides.")
@click.option("--rounds", default=5, show_default=True, help="Timed steps of each implementation.")
@click.option("--kd-ratio", default=0.5, show_default=True, help="Weight of the loss.")
@click.option("--chunk-size", type=int, help="Rows per chunk; by default as in training.")
@click.option(
    "--plain/--no-plain",
    default=True,
    show_default=True,
    help="Also measure the plain evaluation, which takes most of the time.",
)
@click.option(
    "--gradient-error",
    is_flag=True,
    help="Also compare gradients with float64: one more step of each implementation.",
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
    """Compare the time and memory of losses with the matrix products that every loss needs."""
    from kdrun.bench.cases import Settings
    from kdrun.bench.command import bench as run
    from kdrun.bench.plan import make_plan
    from kdrun.run.folder import choose_folder

    folder = choose_folder(output, "bench")
    plan = make_plan(Settings(**settings), tokens, vocabs, losses, peers, folder)
    if not run(plan):
        sys.exit(1)
