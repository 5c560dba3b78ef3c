"""``kdrun generate`` and ``kdrun init-student``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("generate")
@click.argument("student")
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message.")
@click.option(
    "--max-new-tokens",
    default=128,
    show_default=True,
    metavar="N",
    type=click.IntRange(1),
    help="Maximum length of the answer.",
)
@click.option(
    "--sampling-temperature",
    default=0.0,
    show_default=True,
    metavar="T",
    type=click.FloatRange(0),
    help="0 selects the most likely token.",
)
@click.option("--seed", default=0, show_default=True, metavar="SEED", help="Seed of the sampling.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model."
)
def generate(
    student: str,
    prompt: str,
    max_new_tokens: int,
    sampling_temperature: float,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Generate an answer to a prompt; STUDENT is a model folder, a run folder or a hub id."""
    from kdrun.models.generation import answer
    from kdrun.run.folder import rendering_in

    for piece in answer(
        student,
        prompt,
        max_new_tokens,
        sampling_temperature,
        seed,
        trust_remote_code,
        _say,
        rendering_in(Path(student)),
    ):
        click.echo(piece, nl=False)
    click.echo()


@click.command("init-student")
@click.argument("teacher")
@click.option(
    "--keep-layers",
    required=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of layers to keep.",
)
@click.option("--output", required=True, metavar="DIR", help="Folder of the student.")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that comes with the model."
)
def init_student(teacher: str, keep_layers: int, output: str, trust_remote_code: bool) -> None:
    """Create a student from evenly spaced layers of TEACHER, including the first and last."""
    from kdrun.models.init_student import init_student as make
    from kdrun.quiet import quiet_libraries

    with quiet_libraries():
        made = make(teacher, keep_layers, output, trust_remote_code, _say)
    layers = ", ".join(str(layer) for layer in made.kept_layers)
    click.echo(
        f"{made.folder}: {made.parameters / 1e6:.1f} M parameters, layers {layers} of "
        f"{made.teacher_layers}"
    )


def _say(line: str) -> None:
    """Tell beside what a command prints."""
    click.echo(line, err=True)
