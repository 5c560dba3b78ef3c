"""Options shared by several commands, and the configuration keys that they set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kdrun.errors import InputError

# Flag, configuration key, placeholder, help text. Each flag is a short name for one key.
FLAGS: tuple[tuple[str, str, str, str], ...] = (
    ("--teacher", "model.teacher", "MODEL", "Folder, hub id, GGUF file or server of the teacher."),
    ("--teacher-cache", "model.teacher_cache", "DIR", "Folder written by 'kdrun cache-teacher'."),
    ("--student", "model.student", "MODEL", "Folder or hub id of the student."),
    (
        "--data",
        "data.train",
        "ROWS",
        "Training rows: a file, glob, folder or hub id; repeatable.",
    ),
    ("--eval-data", "data.eval", "ROWS", "Held-out rows; by default 5 % of the training rows."),
    ("--loss", "loss.spec", "SPEC", "Loss, such as generalized_jsd_chunked:beta=0.1."),
    ("--kd-ratio", "loss.kd_ratio", "R", "Weight of the loss; cross-entropy has weight 1 - R."),
    (
        "--token-weight",
        "token_weight.spec",
        "SPEC",
        "How much each token counts, such as disagreement:power=0.5.",
    ),
    (
        "--features",
        "features.spec",
        "SPEC",
        "Loss on hidden states, such as hidden_cosine:layers=uniform,weight=0.1.",
    ),
    ("--temperature", "loss.temperature", "T", "Softens both distributions."),
    (
        "--procedure",
        "procedure.spec",
        "SPEC",
        "The source of the training text, such as gkd:lambda=0.5.",
    ),
    ("--max-steps", "training.max_steps", "N", "Optimiser steps."),
    ("--batch-size", "training.batch_size", "B", "Rows per micro-batch in each process."),
    ("--max-length", "data.max_length", "L", "Maximum number of tokens in a row."),
    ("--lr", "optimizer.lr", "LR", "Peak learning rate."),
    ("--lora-rank", "lora.rank", "N", "Train adapters of this rank instead of all weights."),
    ("--seed", "training.seed", "SEED", "Initial weights, order of rows and dropout."),
    (
        "--report-to",
        "training.report_to",
        "NAME",
        "Experiment tracker, such as tensorboard; none by default.",
    ),
    ("--output", "output.dir", "DIR", "Folder of the run; by default runs/<time>-<loss>."),
)


_SEVERAL = ("data.train", "data.eval")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags that set configuration keys of a run."""
    for flag, key, placeholder, text in reversed(FLAGS):
        name = key.replace(".", "__")
        many = key in _SEVERAL
        command = click.option(flag, name, metavar=placeholder, help=text, multiple=many)(command)
    return command


def config_options(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--config`` and ``--set``.

    Args:
        text: help text of ``--config``.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set section.key; repeatable.",
        )(command)
        return click.option("--config", type=click.Path(path_type=Path), help=text)(command)

    return add


def overrides_of(
    settings: Sequence[str], given: Sequence[tuple[str, str | tuple[str, ...] | None]]
) -> list[tuple[str, Any]]:
    """Keys and values from ``--set`` and from the flags; the flags come last and win."""
    from kdrun.config.load import parse_value

    overrides: list[tuple[str, Any]] = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected section.key=value")
        overrides.append((key.strip(), parse_value(key.strip(), value)))
    for key, several in given:
        texts = (several,) if isinstance(several, str) else several or ()
        if len(texts) > 1:
            overrides.append((key, list(texts)))
        elif texts:
            overrides.append((key, parse_value(key, texts[0])))
    return overrides
