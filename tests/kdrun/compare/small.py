"""Comparisons small enough to be run in a test, in the test's own process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kdrun.cli import cli
from kdrun.compare.command import Options
from kdrun.errors import InputError

QUICK = (
    *("--max-steps", "3", "--batch-size", "4", "--max-length", "32"),
    *("--set", "loss.compiled=false"),
)


def rows_file(folder: Path, count: int = 60) -> Path:
    """Short instructions for the built-in pair."""
    file = folder / "rows.jsonl"
    rows = [
        {"prompt": f"What is statement {i}?", "response": f"It is number {i} of the list."}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def text_file(folder: Path) -> Path:
    """Short documents."""
    file = folder / "text.txt"
    lines = [f"Document {i} says that {i} is a number like {i + 1}. " * 6 for i in range(40)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def kdrun(*arguments: object) -> Result:
    """Run a command in this process; what it raises is raised here."""
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, env={"COLUMNS": "200"}, catch_exceptions=False)


def compare(*arguments: object) -> str:
    """Run a comparison to its end; what it printed."""
    return kdrun("compare-losses", *QUICK, *arguments).stderr


def refused(*arguments: object) -> str:
    """The one line of a command that is refused as wrong input."""
    with pytest.raises(InputError) as caught:
        kdrun(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by their names."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "records").glob("*.json")
    }


def options(data: Path, **changes: Any) -> Options:
    """What the command makes of ``--data`` and :data:`QUICK`."""
    given: dict[str, Any] = {
        "losses": ("forward_kl_chunked",),
        "kd_ratios": (),
        "lrs": (),
        "teachers": (),
        "students": (),
        "seeds": 1,
        "tuning_seeds": 2,
        "yardstick": "ce",
        "difference": None,
        "config": None,
        "overrides": (
            ("data.train", str(data)),
            ("training.max_steps", 3),
            ("training.batch_size", 4),
            ("data.max_length", 32),
            ("loss.compiled", False),
        ),
        "output": None,
        "keep_students": False,
        "teacher_cache": True,
        "jobs": 1,
        "cluster": None,
        "dry_run": False,
    }
    return Options(**{**given, **changes})
