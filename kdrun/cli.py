"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kdrun.errors import InputError, Interrupted, TrainingError
from kdrun.paths import expand_home

# Flag, configuration key, placeholder, help. Every flag is a short name for one key.
_FLAGS: tuple[tuple[str, str, str, str], ...] = (
    ("--teacher", "model.teacher", "MODEL", "Folder, hub id or GGUF file of the teacher."),
    ("--teacher-cache", "model.teacher_cache", "DIR", "What 'kdrun cache-teacher' wrote."),
    ("--student", "model.student", "MODEL", "Folder or hub id of the student."),
    ("--data", "data.train", "FILE", "Training rows: a file or a hub id."),
    ("--eval-data", "data.eval", "FILE", "Held-out rows; by default 5 % of the training rows."),
    ("--loss", "loss.spec", "SPEC", "Loss, such as generalized_jsd_chunked:beta=0.1."),
    ("--kd-ratio", "loss.kd_ratio", "R", "Weight of the loss; 1 - R weighs cross-entropy."),
    ("--temperature", "loss.temperature", "T", "Softens both sides of the loss."),
    ("--procedure", "procedure.spec", "SPEC", "Whose text is learned from: gkd:lambda=0.5, ..."),
    ("--max-steps", "training.max_steps", "N", "Optimiser steps."),
    ("--batch-size", "training.batch_size", "B", "Rows per process and micro-batch."),
    ("--max-length", "data.max_length", "L", "Tokens a row."),
    ("--lr", "optimizer.lr", "LR", "Highest learning rate."),
    ("--lora-rank", "lora.rank", "N", "Train adapters of this rank instead of all weights."),
    ("--seed", "training.seed", "SEED", "Initial weights, order of rows and dropout."),
    ("--report-to", "training.report_to", "NAME", "Tracker, such as tensorboard; none."),
    ("--output", "output.dir", "DIR", "Folder of the run; by default runs/<time>-<loss>."),
)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for flag, key, placeholder, text in reversed(_FLAGS):
        name = key.replace(".", "__")
        command = click.option(flag, name, metavar=placeholder, help=text)(command)
    return command


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


@click.group(cls=_Group, invoke_without_command=True)
@_run_options
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
    from kdrun.config import load_config
    from kdrun.distillation import distill

    overrides = _overrides(settings, given)
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


def _overrides(
    settings: Sequence[str], given: Sequence[tuple[str, str | None]]
) -> list[tuple[str, Any]]:
    """Keys and values of ``--set`` and of the flags that were given, which win."""
    from kdrun.config import parse_value

    overrides: list[tuple[str, Any]] = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected section.key=value")
        overrides.append((key.strip(), parse_value(key.strip(), value)))
    return overrides + [(key, parse_value(key, text)) for key, text in given if text is not None]


def _config_in(folder: Path) -> Path:
    """The configuration that a run wrote, so that ``--resume --output DIR`` is enough."""
    from kdrun.runs import CONFIG

    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume: {folder} holds no run to continue")
    return folder / CONFIG


@cli.group()
def losses() -> None:
    """List, show, check and create losses."""


@losses.command("list")
@click.option("--details", is_flag=True, help="Import each loss; show parameters and reference.")
def list_losses(details: bool) -> None:
    """List the registered losses; each also exists with the suffix _chunked."""
    from kdrun.show_losses import print_list

    print_list(details)


@losses.command("show")
@click.argument("name")
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE", help="Write the plot: .png or .svg."
)
def show_loss(name: str, plot: Path | None) -> None:
    """Show the formula, parameters, traits and plot of a loss."""
    from kdrun.show_losses import print_loss

    print_loss(name, plot)


@losses.command("check")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Check every registered loss.")
def check_losses(name: str | None, everything: bool) -> None:
    """Run the conformance checks of a loss; exit code 1 when one fails."""
    if everything == (name is not None):
        raise click.UsageError("give the name of a loss, or --all")
    from kdrun.check_losses import check_all, check_one

    passed = check_all() if name is None else check_one(name)
    if not passed:
        sys.exit(1)


@losses.command("new")
@click.argument("name")
@click.option("--output", metavar="DIR", help="Folder to write; by default kdlosses-NAME here.")
def new_loss(name: str, output: str | None) -> None:
    """Write a complete distribution with an example loss, its tests and a README."""
    from kdrun.new_loss import new_loss as write

    folder = write(name, output)
    click.echo(f"{folder}: cd there, then pip install -e '.[dev]' && pytest")


@cli.group()
def procedures() -> None:
    """List, show and check procedures: whose text is learned from."""


@procedures.command("list")
def list_procedures() -> None:
    """List the registered procedures."""
    from kdrun.show_procedures import print_list

    print_list()


@procedures.command("show")
@click.argument("name")
def show_procedure(name: str) -> None:
    """Show what a procedure does, its parameters and defaults."""
    from kdrun.show_procedures import print_procedure

    print_procedure(name)


@procedures.command("check")
@click.argument("name")
def check_procedures(name: str) -> None:
    """Run the conformance checks of a procedure; exit code 1 when one fails."""
    from kdrun.show_procedures import print_checks

    if not print_checks(name):
        sys.exit(1)


@cli.command("bench")
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
    from kdrun.bench.command import bench as run
    from kdrun.bench.plan import Settings, make_plan
    from kdrun.runs import choose_folder

    folder = choose_folder(output, "bench")
    plan = make_plan(Settings(**settings), tokens, vocabs, losses, peers, folder)
    if not run(plan):
        sys.exit(1)


@cli.command("compare-losses")
@click.option("--loss", "losses", multiple=True, metavar="SPEC", help="Loss; repeat for more.")
@click.option(
    "--kd-ratio", "kd_ratios", multiple=True, type=float, metavar="R", help="Weight of the losses."
)
@click.option("--lr", "lrs", multiple=True, type=float, metavar="LR", help="Learning rate.")
@click.option("--teacher", "teachers", multiple=True, metavar="MODEL", help="Teacher.")
@click.option("--student", "students", multiple=True, metavar="MODEL", help="Initial student.")
@click.option(
    "--procedure",
    "procedures",
    multiple=True,
    metavar="SPEC",
    help="Whose text is learned from, with every loss; 'none' is the data's.",
)
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    metavar="N",
    help="Trials of each arm; 2 for a verdict.",
)
@click.option(
    "--tuning-seeds",
    default=2,
    show_default=True,
    metavar="N",
    help="Trials that choose where --lr or --kd-ratio is given several times.",
)
@click.option("--yardstick", default="ce", show_default=True, metavar="NAME", help="Primary one.")
@click.option(
    "--difference", type=float, metavar="D", help="Smallest difference of interest on it."
)
@click.option("--data", metavar="FILE", help="Training rows: a file or a hub id.")
@click.option("--eval-data", metavar="FILE", help="Held-out rows.")
@click.option("--temperature", metavar="T", help="Softens both sides of every loss.")
@click.option("--max-steps", metavar="N", help="Optimiser steps of a trial.")
@click.option("--batch-size", metavar="B", help="Rows per micro-batch.")
@click.option("--max-length", metavar="L", help="Tokens a row.")
@click.option("--config", type=click.Path(path_type=Path), help="YAML with what all trials share.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set section.key; repeatable."
)
@click.option("--output", metavar="DIR", help="Folder; by default runs/<time>-comparison.")
@click.option("--keep-students", is_flag=True, help="Keep the weights of every trial.")
@click.option(
    "--teacher-cache/--no-teacher-cache",
    default=True,
    show_default=True,
    help="Run each teacher once for all trials, or in every trial.",
)
@click.option(
    "--jobs", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Processes."
)
@click.option(
    "--launcher",
    default="local",
    show_default=True,
    type=click.Choice(("local", "ray")),
    help="ray runs trials as tasks of a cluster.",
)
@click.option(
    "--trial-cpus",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Cores of a trial on Ray; 1.",
)
@click.option(
    "--trial-gpus",
    type=click.FloatRange(0),
    metavar="N",
    help="GPUs of a trial on Ray, also a share of one; 1 where there are any.",
)
@click.option("--ray-address", metavar="HOST:PORT", help="Of a running Ray cluster.")
@click.option("--dry-run", is_flag=True, help="Show the trials and the time they take.")
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
    """Compare losses fairly: paired trials over seeds, a verdict for each, a report.

    Every option that says so may be repeated. All trials share initial student, steps and
    evaluation; those of a seed also the order of rows. A baseline on cross-entropy alone is always
    there. The same command on the same --output resumes, and runs only what is new.
    """
    from kdrun.compare.cluster import Cluster
    from kdrun.compare.command import Options
    from kdrun.compare.command import compare_losses as compare
    from kdrun.progress import make_console

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
                "--jobs goes with --launcher local; Ray runs as many trials as there is room for"
            )
        cluster = Cluster(trial_cpus or 1.0, trial_gpus, ray_address)
    else:
        for option, value in (
            ("--trial-cpus", trial_cpus),
            ("--trial-gpus", trial_gpus),
            ("--ray-address", ray_address),
        ):
            if value is not None:
                raise click.UsageError(f"{option} goes with --launcher ray")
    overrides = tuple(_overrides(settings, list(flags.items())))
    compare(Options(overrides=overrides, cluster=cluster, **given), make_console())


@cli.command("report")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write the report of a comparison anew, finished or not; DIR is its --output."""
    from kdrun.compare.command import report_again
    from kdrun.progress import make_console

    report_again(folder, make_console())


@cli.command("evaluate")
@click.argument("students", nargs=-1, required=True, metavar="STUDENT...")
@click.option("--teacher", metavar="MODEL", help="Measure it too, and the distance to it.")
@click.option("--data", metavar="FILE", help="Rows to measure on, or 'builtin'.")
@click.option("--max-length", metavar="L", help="Tokens a row.")
@click.option("--batch-size", metavar="B", help="Rows at once.")
@click.option("--answers", metavar="N", help="Prompts to answer and score.")
@click.option("--max-new-tokens", metavar="N", help="Where an answer is cut.")
@click.option("--answer-pattern", metavar="REGEX", help="Its group is the final answer.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Task of lm-eval; repeatable.")
@click.option(
    "--task-folder", type=click.Path(path_type=Path), metavar="DIR", help="With task files."
)
@click.option(
    "--task-data", type=click.Path(path_type=Path), metavar="FILE", help="Read by such a task."
)
@click.option(
    "--task-limit", type=click.IntRange(1), metavar="N", help="Questions of each task; all."
)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of a run.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set section.key; repeatable."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Results as JSON.")
def evaluate(
    students: tuple[str, ...],
    teacher: str | None,
    data: str | None,
    max_length: str | None,
    batch_size: str | None,
    answers: str | None,
    max_new_tokens: str | None,
    answer_pattern: str | None,
    tasks: tuple[str, ...],
    task_folder: Path | None,
    task_data: Path | None,
    task_limit: int | None,
    config: Path | None,
    settings: tuple[str, ...],
    output: Path | None,
) -> None:
    """Measure models on the same rows: STUDENT is a folder, a run's folder or a hub id.

    With --task they also answer tasks of lm-eval, such as truthfulqa_mc2 or hellaswag.
    """
    for option, value in (
        ("--task-folder", task_folder),
        ("--task-data", task_data),
        ("--task-limit", task_limit),
    ):
        if value is not None and not tasks:
            raise click.UsageError(f"{option} goes with --task")
    from kdrun.config import BUILT_IN, load_config
    from kdrun.evaluation.command import evaluate as run
    from kdrun.evaluation.tasks import TaskChoice
    from kdrun.progress import make_console

    given = [
        ("model.teacher", teacher),
        ("model.student", students[0]),
        ("loss.kd_ratio", "0" if teacher is None else None),
        ("data.train", data or BUILT_IN),  # a student without training rows would be refused
        ("data.eval", data),
        ("data.max_length", max_length),
        ("training.batch_size", batch_size),
        ("evaluation.answers", answers),
        ("evaluation.max_new_tokens", max_new_tokens),
        ("evaluation.answer_pattern", answer_pattern),
    ]
    choice = TaskChoice(tuple(dict.fromkeys(tasks)), task_folder, task_data, task_limit)
    run_config = load_config(config, _overrides(settings, given))
    run(run_config, students, choice, output, make_console())


@cli.command("config")
def config_command() -> None:
    """Print the full default configuration as YAML, each key with its meaning."""
    from kdrun.show_config import default_yaml

    click.echo(default_yaml(), nl=False)


@cli.command("generate")
@click.argument("student")
@click.option("--prompt", required=True, metavar="TEXT", help="The user's message.")
@click.option(
    "--max-new-tokens", default=128, show_default=True, metavar="N", type=click.IntRange(1)
)
@click.option(
    "--sampling-temperature",
    default=0.0,
    show_default=True,
    metavar="T",
    type=click.FloatRange(0),
    help="0 takes the most likely token.",
)
@click.option("--seed", default=0, show_default=True, metavar="SEED")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def generate(
    student: str,
    prompt: str,
    max_new_tokens: int,
    sampling_temperature: float,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Let a model answer a prompt; STUDENT is a folder, a run's folder or a hub id."""
    from kdrun.generation import answer

    for piece in answer(
        student, prompt, max_new_tokens, sampling_temperature, seed, trust_remote_code
    ):
        click.echo(piece, nl=False)
    click.echo()


@cli.command("init-student")
@click.argument("teacher")
@click.option("--keep-layers", required=True, type=click.IntRange(1), metavar="N")
@click.option("--output", required=True, metavar="DIR", help="Folder of the student.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def init_student(teacher: str, keep_layers: int, output: str, trust_remote_code: bool) -> None:
    """Make a student of evenly spaced layers of TEACHER, first and last kept."""
    from kdrun.models.init_student import init_student as make
    from kdrun.quiet import quiet_libraries

    with quiet_libraries():
        made = make(teacher, keep_layers, output, trust_remote_code)
    layers = ", ".join(str(layer) for layer in made.kept_layers)
    click.echo(
        f"{made.folder}: {made.parameters / 1e6:.1f} M parameters, layers {layers} of "
        f"{made.teacher_layers}"
    )


@cli.command("cache-teacher")
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
    from kdrun.config import load_config

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
    run_config = load_config(config, _overrides(settings, given))
    run(
        run_config,
        expand_home(output),
        "hidden" if kind == "hidden" else "top_k" if kind == "top-k" else "sampled",
        (draws if kind == "sampled" else k) or 50,
    )


def main() -> None:
    """Run the command line with the project's exit codes."""
    from kdlosses import BrokenLossError, LossSpecError
    from kdrun.quiet import quiet_environment

    quiet_environment()

    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (InputError, LossSpecError, BrokenLossError) as error:
        click.echo(f"kdrun: {error}", err=True)
        sys.exit(2)
    except TrainingError as error:
        click.echo(f"kdrun: {error}", err=True)
        sys.exit(1)
    except Interrupted as error:
        click.echo(f"kdrun: {error}", err=True)
        sys.exit(130)
    except (click.Abort, KeyboardInterrupt):
        click.echo("kdrun: interrupted", err=True)
        sys.exit(130)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"kdrun: {place}{error.strerror or error}", err=True)
        sys.exit(1)
